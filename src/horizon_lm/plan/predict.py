"""Predict a step: bytes by part on host and device, seconds by lane, and the limiting lane.

The schedule that the engine would run (`schedule.build`) is simulated with the costs of its ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.store import predict_bytes
from horizon_lm.plan.costs import DEVICE, HOST, Costs
from horizon_lm.plan.outline import Outline
from horizon_lm.schedule import Lane, Op, Simulation, StepSpec, build, derive_waits, simulate
from horizon_lm.schedule.draw import busy_seconds


@dataclass(frozen=True)
class Prediction:
    """Prediction for one steady-state step.

    costs: those of its ops. host, device: bytes by part; device is empty if the device is the CPU.
    scoring: a forward pass over the documents of the step, for log-probabilities, if the method needs any.
    """

    settings: ModelSettings
    costs: Costs
    host: dict[str, int]
    device: dict[str, int]
    simulation: Simulation
    scoring: Simulation | None = None

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
        names = ("weights", "residual", "exp_avg", "exp_avg_sq", "grads", "grad_slabs")
        return sum(self.host.get(name, 0) for name in names)

    @property
    def pinned_bytes(self) -> int:
        """Host bytes that are locked for copies from and to a device with its own memory."""
        names = ("weights", "grads", "grad_slabs", "boundary") if self.device else ()
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
        """Seconds of a step's forward pass over other completions, from which KTO estimates its KL term."""
        return self._score_seconds if self._preferences and self._preferences.uses_kl else 0.0

    @property
    def reference_seconds(self) -> float:
        """Seconds of the reference's pass over the samples of one step; 0 without a reference."""
        config = self._preferences
        if config is None or not config.uses_reference:
            return 0.0
        return self._score_seconds * (2 if config.uses_kl else 1)

    @property
    def reference_tokens_per_second(self) -> float:
        """Documents of the KL term count as well."""
        return self.tokens / self._score_seconds if self.reference_seconds else 0.0

    @property
    def _score_seconds(self) -> float:
        return self.scoring.seconds if self.scoring is not None else 0.0

    @property
    def _preferences(self) -> TrainConfig | None:
        return _preferences(self.settings)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def lanes(self) -> dict[str, float]:
        """Busy seconds of each lane."""
        found = {str(lane): 0.0 for lane in Lane} | busy_seconds(self.simulation.spans)
        if self.kl_seconds and self.scoring is not None:
            for lane, seconds in busy_seconds(self.scoring.spans).items():
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
    smoothing, is_preference = settings.label_smoothing_factor, preferences is not None
    measures = outline.measures(batch, tokens, policies.loss_chunk, smoothing, is_preference)
    spec = store_spec(settings, outline)
    costs = Costs(outline, measures, policies, policies.step_spec(micro_batches), spec, profile)
    # Ops that run one at a time wait for nothing but the op before.
    ops, waits = (ops_of(costs.plan), None) if costs.is_cpu else schedule_of(costs.plan)
    simulation = simulate(
        ops,
        costs.seconds,
        num_bytes=costs.num_bytes,
        working_bytes=costs.working_bytes,
        waits=waits,
        one_at_a_time=costs.is_cpu,
    )
    host = {"process": int(profile.process_bytes), **predict_bytes(outline.units, spec)}
    host |= simulation.parts.get(HOST, {})
    device: dict[str, int] = {}
    if costs.is_cpu:
        fixed = costs.fixed_bytes()
        transient = sum(simulation.parts.get(HOST, {}).values()) + fixed.get("waiting_gradients", 0)
        host |= fixed
        host["heap"] = int(profile.heap_share * transient)
    else:
        device = {"context": int(profile.context_bytes), **costs.fixed_bytes()}
        device |= simulation.parts.get(DEVICE, {})
    scoring = _scoring(costs) if preferences is not None and preferences.uses_reference else None
    return Prediction(settings, costs, host, device, simulation, scoring)


def _preferences(settings: ModelSettings) -> TrainConfig | None:
    return settings if isinstance(settings, TrainConfig) and settings.is_preference else None


def _scoring(costs: Costs) -> Simulation:
    """Simulate a forward pass alone. It needs less memory than a step with the same micro-batches."""
    spec = costs.policies.step_spec(costs.plan.micro_batches, evaluate=True)
    costs = replace(costs, plan=spec)
    ops = build(spec)
    return simulate(
        ops,
        costs.seconds,
        num_bytes=costs.num_bytes,
        working_bytes=costs.working_bytes,
        waits=None if costs.is_cpu else derive_waits(ops),
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
    return build(plan, step=1, pending=plan.trainable if plan.update == "deferred" else ())
