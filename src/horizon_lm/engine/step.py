"""State in flight: the running step, and an update that is not finished yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from horizon_lm.engine.ends import Rows
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.layers import LayerGraph, Rerun
from horizon_lm.engine.loss import Asked, Draws, HeadLoss, Metrics, TokenValues
from horizon_lm.engine.positions import Positions
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.model.capture import Call
from horizon_lm.optim.gradients import ordered_sum
from horizon_lm.optim.optimizer import UpdateSettings
from horizon_lm.optim.progress import Progress
from horizon_lm.schedule import Buffer, Op, StepSpec, derive_waits, last_uses
from horizon_lm.words import count


class Schedule(NamedTuple):
    """Ops in program order, the ops each waits for, and the buffers each is the last to use.

    digest: of the ops, for several ranks to compare.
    """

    ops: list[Op]
    waits: list[tuple[int, ...]]
    ends: list[tuple[Buffer, ...]]
    digest: str = ""

    @classmethod
    def of(cls, ops: list[Op]) -> Schedule:
        return cls(ops, derive_waits(ops), last_uses(ops))

    @property
    def norm(self) -> int:
        """Index of the op that takes the gradient norm."""
        return next(i for i, op in enumerate(self.ops) if op.kind == "N")


@dataclass
class Update:
    """An update of the trainable units, and its progress.

    eager: each unit is updated as its gradient arrives, before all gradients are known to be finite. Other
    updates are decided as a whole and then always completed. stopped_at: the unit whose gradient was not
    finite, before which eager updates stopped.
    """

    settings: UpdateSettings
    eager: bool
    progress: dict[int, Progress]
    grad_scale: float = 1.0
    stopped_at: int | None = None

    @classmethod
    def of(cls, units: Iterable[int], settings: UpdateSettings, *, eager: bool = False) -> Update:
        return cls(settings, eager, {unit: Progress() for unit in units})

    @property
    def left(self) -> set[int]:
        """Units not updated yet, or interrupted."""
        return {unit for unit, progress in self.progress.items() if not progress.is_done}

    @property
    def has_begun(self) -> bool:
        return any(progress.has_begun for progress in self.progress.values())

    @property
    def is_torn(self) -> bool:
        """Whether eager updates stopped half-way. Meaningful only while none is running."""
        return self.eager and self.has_begun and bool(self.left)

    @property
    def counts(self) -> bool:
        """Whether readers of the weights will find the update done."""
        return not self.eager or not self.left

    @property
    def extent(self) -> str:
        """What was updated, as in "20 of 48 units"."""
        return f"{len(self.progress) - len(self.left):,} of {count(len(self.progress), 'unit')}"


@dataclass
class Step:
    """A running step: its schedule, micro-batches and transient buffers.

    With several ranks, `spec`, ops and what follows are of this rank's `positions`; of all ranks are
    token_counts (tokens of each micro-batch), num_tokens (targets that count) and rows (the embedding rows
    used, if they or the prologue need gradients); data: hashes of all micro-batches, for ranks to compare.
    targets: [batch, tokens] on the host per micro-batch. number: steps done before it. head_losses: one per
    micro-batch. metrics: what a loss function returns besides the loss (device_metrics: the same before they
    are read). router_weight: see `TokenLoss`; router_losses: before that weight. asked, wants_routers: what
    an evaluation computes besides the loss. values: those it found. update: what the O and A ops of this
    schedule apply. Once the step has run, losses, router_losses, metrics and, if asked for, values are those
    of all ranks' micro-batches, by their numbers (`engine.results`).
    gradients: those that accumulate, by unit. parked: by sum slab, those of one micro-batch each that the
    host adds to host_sums (by unit). given: those to be added up over ranks, by unit and slot; totals: this
    rank's shards of the sums, by unit. resident_gradients: complete ones of resident units (eager updates).
    square_norms: squares of complete gradients (`download_gradient`), by unit; norm_of_all: their norm, once
    several ranks have taken it. ends_itself: its gradients are of no use after the call that made them.
    """

    spec: StepSpec
    schedule: Schedule
    micro_batches: Sequence[MicroBatch] = ()
    targets: list[torch.Tensor] = field(default_factory=list)
    positions: Positions = Positions()
    token_counts: Sequence[int] = ()
    num_tokens: int = 0
    rows: Rows | None = None
    number: int = 0
    rng_base: int = 0
    data: list[str] = field(default_factory=list)
    head_losses: list[HeadLoss] = field(default_factory=list)
    update: Update | None = None
    ends_itself: bool = False
    memory: dict[Buffer, torch.Tensor | Call | LayerGraph | Rerun] = field(default_factory=dict)
    gradients: dict[int, UnitGradient] = field(default_factory=dict)
    parked: dict[int, UnitGradient] = field(default_factory=dict)
    host_sums: dict[int, UnitGradient] = field(default_factory=dict)
    given: dict[tuple[int, int], UnitGradient] = field(default_factory=dict)
    totals: dict[int, torch.Tensor] = field(default_factory=dict)
    resident_gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    router_weight: float | None = None
    wants_routers: bool = False
    router_losses: dict[int, torch.Tensor] = field(default_factory=dict)
    asked: Asked = Asked()
    values: dict[int, TokenValues] = field(default_factory=dict)
    device_metrics: list[Metrics] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    square_norms: dict[int, torch.Tensor] = field(default_factory=dict)
    norm_of_all: float | None = None

    def tensor(self, region: str, index: int, micro_batch: int) -> torch.Tensor:
        value = self.memory[Buffer(region, index, micro_batch)]
        assert isinstance(value, torch.Tensor)
        return value

    def call(self, micro_batch: int) -> Call:
        value = self.memory[Buffer("call", -1, micro_batch)]
        assert isinstance(value, Call)
        return value

    def graph(self, unit: int, micro_batch: int) -> LayerGraph | Rerun:
        value = self.memory[Buffer("graph", unit, micro_batch)]
        assert isinstance(value, (LayerGraph, Rerun))
        return value

    def draws(self, op: Op, device: torch.device) -> Draws:
        """The random state of the op's unit on its micro-batch."""
        return partial(random_state, device, self.rng_base, op.unit, self.positions.number(op.micro_batch))

    @property
    def loss(self) -> float:
        """Sum over the micro-batches; waits for the device."""
        return float(sum(float(loss) for loss in self.losses.values()))

    def norm(self) -> float:
        """Global gradient norm, summed in a fixed order regardless of the order of downloads."""
        return sum(ordered_sum(self.square_norms[unit]) for unit in sorted(self.square_norms)) ** 0.5

    def is_finite(self, unit: int) -> bool:
        """Whether the loss, and the gradient of the unit, are finite (eager updates).

        The loss is known before any update, so it is looked at only once.
        """
        assert self.update is not None
        finite = bool(self.square_norms[unit].isfinite().all())
        return finite and (self.update.has_begun or math.isfinite(self.loss))


@contextmanager
def random_state(device: torch.device, base: int, unit: int, micro_batch: int) -> Iterator[None]:
    """While open, make random numbers depend on (seed and step, unit, micro-batch) alone.

    A recompute thus draws the same dropout masks regardless of what ran in between. Every pass of a unit
    gets such a state, whether it draws or not, so no setting or kind of module has to tell which layers
    have noise (dropout, jitter, stochastic depth). Only torch's generators are set; no supported model draws
    from those of Python or numpy. The caller's generators are restored.

    Sets generators one by one: torch.manual_seed asks every kind of device, which takes a hundred times as
    long. Never waits for the device.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    seed = hash((base, unit, micro_batch)) & 0x7FFF_FFFF_FFFF_FFFF
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
