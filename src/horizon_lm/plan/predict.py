"""Predict a step: bytes by part on host and device, seconds by lane, and the limiting lane.

The schedule that the engine would run (`schedule.build`) is simulated with the costs of its ops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.regions import predict_bytes, predict_device_bytes
from horizon_lm.memory.shards import WHOLE, Shard
from horizon_lm.plan.costs import DEVICE, HOST, Costs
from horizon_lm.plan.fleet import Network
from horizon_lm.plan.outline import Measures, Outline
from horizon_lm.plan.steps import SimulatedStep, simulate_ops, simulate_step
from horizon_lm.preference.method import Method
from horizon_lm.preference.reference import TOGETHER
from horizon_lm.schedule import Lane, Simulation, StepSpec
from horizon_lm.schedule.draw import busy_seconds

# Micro-batches times layers that are simulated one by one, which takes about a second.
MOST_VISITS = 8000


class Sizes(NamedTuple):
    """A step of micro-batches [batch, tokens], of all ranks together."""

    batch: int
    tokens: int
    micro_batches: int


@dataclass(frozen=True)
class Prediction:
    """Prediction for one steady-state step.

    costs: those of its ops. host, device: bytes by part; device is empty if the device is the CPU. With
    several ranks all figures are those of one rank, but for tokens, which are those of all.
    kl: the forward pass of a KL term, before each step. reference: a piece of the reference's pass over the
    data, of `reference_tokens`. Both only if the method needs them.
    """

    settings: ModelSettings
    costs: Costs
    host: dict[str, int]
    device: dict[str, int]
    step: SimulatedStep
    kl: Simulation | None = None
    reference: Simulation | None = None
    reference_tokens: int = 0

    @property
    def simulation(self) -> Simulation:
        return self.step.simulation

    @property
    def plan(self) -> StepSpec:
        return self.costs.plan

    @property
    def profile(self) -> Profile:
        return self.costs.profile

    @property
    def micro_batches(self) -> int:
        """Of all ranks."""
        return self.costs.total

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
        names = ("weights", "frozen", "packed", "residual", "exp_avg", "exp_avg_sq", "grads", "grad_slabs")
        return sum(self.host.get(name, 0) for name in (*names, "sums", "sum_slabs"))

    @property
    def pinned_bytes(self) -> int:
        """Host bytes that are locked for copies from and to a device with its own memory."""
        if not self.device:
            return 0
        names = ("weights", "frozen", "packed", "grads", "grad_slabs", "sums", "sum_slabs", "boundary")
        return sum(self.host.get(name, 0) for name in names)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def tokens(self) -> int:
        return self.batch * self.tokens_per_row * self.micro_batches

    @property
    def seconds(self) -> float:
        return self.step.seconds + self.kl_seconds

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
        lanes = [lane for lane in Lane if lane is not Lane.NETWORK or self.plan.is_shared]
        found = {str(lane): 0.0 for lane in lanes} | self.step.busy
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
    return prediction_of(costs_of(outline, settings, profile, Sizes(batch, tokens, micro_batches)))


def prediction_of(costs: Costs, most_visits: int = MOST_VISITS) -> Prediction:
    """Predict a step by the costs of its ops.

    most_visits: micro-batches times layers beyond which a shorter step stands for it (`plan.steps`).
    """
    outline, settings = costs.outline, costs.policies.settings
    batch, tokens = costs.measures.batch, costs.measures.tokens
    preferences = _preferences(settings)
    stored = predict_bytes(outline.units, costs.spec)
    has_kl = preferences is not None and preferences.uses_kl
    step = simulate_step(costs, replace(costs.plan, update="sync") if has_kl else costs.plan, most_visits)
    host, device = _bytes(costs, step.simulation, stored)
    kl = _simulate_forward(costs, costs.total) if has_kl else None
    if preferences is None or not preferences.uses_reference:
        return Prediction(settings, costs, host, device, step, kl)
    size = preferences.precompute_ref_batch_size
    batch = batch if size is None else preferences.sides * size
    costs_of_pass = replace(costs, measures=_measures(outline, settings, costs.policies, batch, tokens))
    reference = _simulate_forward(costs_of_pass, TOGETHER)
    kept = ("weights", "frozen", "packed", "residual")
    stored = {name: size for name, size in stored.items() if name in kept}
    in_pass = _bytes(costs_of_pass, reference, stored)  # moments and gradients have no pages yet
    host, device = (
        max(one, other, key=lambda parts: sum(parts.values()))
        for one, other in zip((host, device), in_pass, strict=True)
    )
    total = TOGETHER * batch * tokens
    return Prediction(settings, costs, host, device, step, kl, reference, total)


def costs_of(
    outline: Outline,
    settings: ModelSettings,
    profile: Profile,
    sizes: Sizes,
    network: Network | None = None,
) -> Costs:
    """Return the costs of the ops of a step. With a network those of one of its ranks, of which `profile` is
    the share of the machine (`Profile.of_rank`)."""
    world = 1 if network is None else network.fleet.world
    policies = Policies.of(settings, outline, world=world)
    measures = _measures(outline, settings, policies, sizes.batch, sizes.tokens)
    spec = store_spec(settings, outline, WHOLE if world == 1 else Shard(0, world))
    plan = policies.step_spec(-(-sizes.micro_batches // world))
    return Costs(outline, measures, policies, plan, spec, profile, sizes.micro_batches, network)


def _measures(
    outline: Outline, settings: ModelSettings, policies: Policies, batch: int, tokens: int
) -> Measures:
    preferences = _preferences(settings)
    return outline.measures(
        batch,
        tokens,
        policies.loss_chunk,
        settings.label_smoothing_factor,
        None if preferences is None else Method(preferences).values,
    )


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
    """Simulate a forward pass of all ranks' micro-batches for log-probabilities."""
    spec = costs.policies.step_spec(-(-micro_batches // costs.plan.world), evaluate=True)
    return simulate_ops(replace(costs, plan=spec, total=micro_batches), spec)
