"""Predict a step: bytes by part on host and device, seconds by lane, and the limiting lane.

The schedule that the engine would run (`schedule.build`) is simulated with the costs of its ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.store import predict_bytes, predict_device_bytes
from horizon_lm.plan.costs import DEVICE, HOST, Costs
from horizon_lm.plan.outline import Outline
from horizon_lm.preference.method import Method
from horizon_lm.preference.reference import TOGETHER
from horizon_lm.schedule import Lane, Op, Simulation, StepSpec, build, derive_waits, simulate
from horizon_lm.schedule.draw import busy_seconds


@dataclass(frozen=True)
class Prediction:
    """Prediction for one steady-state step.

    costs: those of its ops. host, device: bytes by part; device is empty if the device is the CPU.
    kl: the forward pass of a KL term, before each step. reference: a piece of the reference's pass over the
    data, of `reference_tokens`. Both only if the method needs them.
    """

    settings: ModelSettings
    costs: Costs
    host: dict[str, int]
    device: dict[str, int]
    simulation: Simulation
    kl: Simulation | None = None
    reference: Simulation | None = None
    reference_tokens: int = 0

    @property
    def plan(self) -> StepSpec:
        return self.costs.plan

    @property
    def profile(self) -> Profile:
        return self.costs.profile

    @property
    def batch(self) -> int:
        """Sequences of a micro-batch, each of `tokens_per_row`."""
        return self.costs.measures.batch

    @property
    def tokens_per_row(self) -> int:
        return self.costs.measures.tokens

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def store_bytes(self) -> int:
        """Host bytes of weights, gradients and optimizer state."""
        names = ("weights", "residual", "exp_avg", "exp_avg_sq", "grads", "grad_slabs", "sums", "sum_slabs")
        return sum(self.host.get(name, 0) for name in names)

    @property
    def pinned_bytes(self) -> int:
        """Host bytes that are locked for copies from and to a device with its own memory."""
        names = ("weights", "grads", "grad_slabs", "sums", "sum_slabs", "boundary") if self.device else ()
        return sum(self.host.get(name, 0) for name in names)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def tokens(self) -> int:
        return self.batch * self.tokens_per_row * self.plan.micro_batches

    @property
    def seconds(self) -> float:
        return self.simulation.seconds + self.kl_seconds

    @property
    def kl_seconds(self) -> float:
        """Seconds of the forward pass of each step from which KTO estimates its KL term."""
        return self.kl.seconds if self.kl is not None else 0.0

    @property
    def reference_tokens_per_second(self) -> float:
        """Of the reference's pass over the data, documents of the KL term included; 0 without a reference."""
        if self.reference is None:
            return 0.0
        return self.reference_tokens / self.reference.seconds

    @property
    def reference_seconds(self) -> float:
        """Seconds of the reference's pass over the samples of one step; 0 without a reference."""
        if self.reference is None:
            return 0.0
        return self.tokens * (2 if self.kl is not None else 1) / self.reference_tokens_per_second

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def lanes(self) -> dict[str, float]:
        """Busy seconds of each lane."""
        found = {str(lane): 0.0 for lane in Lane} | busy_seconds(self.simulation.spans)
        for lane, seconds in busy_seconds(self.kl.spans if self.kl is not None else ()).items():
            found[lane] += seconds
        return found

    def limit(self) -> str:
        """The busiest lane, and its share of the step."""
        lanes = self.lanes()
        name = max(lanes, key=lanes.__getitem__)
        return f"{name} ({lanes[name] / self.seconds:.0%} of the step)" if self.seconds else name


def predict(
    outline: Outline,
    settings: ModelSettings,
    profile: Profile,
    *,
    batch: int,
    tokens: int,
    micro_batches: int,
) -> Prediction:
    """Predict steps of `micro_batches` micro-batches [batch, tokens]; a pair is two rows, packed or not."""
    policies, preferences = Policies.of(settings, outline), _preferences(settings)
    values = None if preferences is None else Method(preferences).values
    measure = partial(
        outline.measures,
        tokens=tokens,
        loss_chunk=policies.loss_chunk,
        label_smoothing=settings.label_smoothing_factor,
        values=values,
    )
    spec = store_spec(settings, outline)
    costs = Costs(outline, measure(batch), policies, policies.step_spec(micro_batches), spec, profile)
    stored = predict_bytes(outline.units, spec)
    has_kl = preferences is not None and preferences.uses_kl
    simulation = _simulate(costs, replace(costs.plan, update="sync") if has_kl else costs.plan)
    host, device = _bytes(costs, simulation, stored)
    kl = _simulate_forward(costs, micro_batches) if has_kl else None
    if preferences is None or not preferences.uses_reference:
        return Prediction(settings, costs, host, device, simulation, kl)
    size = preferences.precompute_ref_batch_size
    batch = batch if size is None else preferences.sides * size
    costs_of_pass = replace(costs, measures=measure(batch))
    reference = _simulate_forward(costs_of_pass, TOGETHER)
    stored = {name: size for name, size in stored.items() if name in ("weights", "residual")}
    in_pass = _bytes(costs_of_pass, reference, stored)  # moments and gradients have no pages yet
    host, device = (
        max(one, other, key=lambda parts: sum(parts.values()))
        for one, other in zip((host, device), in_pass, strict=True)
    )
    total = TOGETHER * batch * tokens
    return Prediction(settings, costs, host, device, simulation, kl, reference, total)


def _bytes(
    costs: Costs, simulation: Simulation, stored: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """(host bytes by part, device bytes by part). stored: bytes of the store in use."""
    profile = costs.profile
    host = {"process": int(profile.process_bytes), **stored, **simulation.parts.get(HOST, {})}
    resident = predict_device_bytes(costs.outline.units, costs.spec)
    fixed = costs.fixed_bytes()
    if not costs.is_cpu:
        return host, {
            "context": int(profile.context_bytes),
            **resident,
            **fixed,
            **simulation.parts.get(DEVICE, {}),
        }
    transient = sum(simulation.parts.get(HOST, {}).values()) + fixed.get("waiting_gradients", 0)
    return host | resident | fixed | {"heap": int(profile.heap_share * transient)}, {}


def _preferences(settings: ModelSettings) -> TrainConfig | None:
    return settings if isinstance(settings, TrainConfig) and settings.is_preference else None


def _simulate_forward(costs: Costs, micro_batches: int) -> Simulation:
    """Simulate a forward pass for log-probabilities."""
    spec = costs.policies.step_spec(micro_batches, evaluate=True)
    return _simulate(replace(costs, plan=spec), spec)


def _simulate(costs: Costs, spec: StepSpec) -> Simulation:
    """Simulate the ops of `spec`. A pass before each step completes the updates, so that they overlap with
    nothing: spec says sync then, and costs what the engine does."""
    # Ops that run one at a time wait for nothing but the op before.
    ops, waits = (ops_of(spec), None) if costs.is_cpu else schedule_of(spec)
    return simulate(
        ops,
        costs.seconds,
        num_bytes=costs.num_bytes,
        working_bytes=costs.working_bytes,
        waits=waits,
        one_at_a_time=costs.is_cpu,
    )


@lru_cache(maxsize=256)
def schedule_of(plan: StepSpec) -> tuple[Sequence[Op], Sequence[tuple[int, ...]]]:
    """Ops and waits of a step that begins with deferred updates of the step before, as most do."""
    ops = ops_of(plan)
    return ops, derive_waits(ops)


@lru_cache(maxsize=256)
def ops_of(plan: StepSpec) -> Sequence[Op]:
    """The ops of `schedule_of` alone."""
    pends = plan.update == "deferred" and not plan.evaluate
    return build(plan, step=1, pending=plan.trainable if pends else ())
