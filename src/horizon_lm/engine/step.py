"""What is in flight: the step that runs, and an update that is not through yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from horizon_lm.engine.activations import LayerGraph, Rerun
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.loss import HeadLoss
from horizon_lm.model.capture import Call
from horizon_lm.optim.optimizer import UpdateSettings
from horizon_lm.optim.progress import Progress
from horizon_lm.schedule import Buffer, Op, StepPlan
from horizon_lm.words import count

MicroBatch = dict[str, torch.Tensor]


class Schedule(NamedTuple):
    """Ops in program order, what each waits for, and the buffers that each is the last to use."""

    ops: list[Op]
    waits: list[tuple[int, ...]]
    ends: list[tuple[Buffer, ...]]


@dataclass
class Update:
    """An update of the trainable units, and how far it has come.

    eager: each unit is updated as its gradient arrives, before all of them are known to be good; others are
    decided on as a whole, and then made whatever happens. stopped_at: the unit whose gradient was not
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
        """Units whose turn is still to come, or that were cut short."""
        return {unit for unit, progress in self.progress.items() if not progress.is_done}

    @property
    def has_begun(self) -> bool:
        return any(progress.has_begun for progress in self.progress.values())

    @property
    def is_torn(self) -> bool:
        """Eager updates of which some were made and others were not. Only while none is running."""
        return self.eager and self.has_begun and bool(self.left)

    @property
    def counts(self) -> bool:
        """Whether its step is done, as far as anybody can tell who reads the weights."""
        return not self.eager or not self.left

    @property
    def extent(self) -> str:
        """What was updated, as in "20 of 48 units"."""
        return f"{len(self.progress) - len(self.left):,} of {count(len(self.progress), 'unit')}"


@dataclass
class Step:
    """The step in flight: its schedule, its micro-batches and its transient buffers.

    targets: [batch, tokens] on the host for each micro-batch; num_tokens: those that count. number: of the
    steps that were done before it. head_losses: one for each micro-batch. update: what the O ops of this
    schedule apply. ends_itself: its gradients are of no use but to the call that made them.
    """

    plan: StepPlan
    schedule: Schedule
    micro_batches: Sequence[MicroBatch] = ()
    targets: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    number: int = 0
    rng_base: int = 0
    head_losses: list[HeadLoss] = field(default_factory=list)
    update: Update | None = None
    ends_itself: bool = False
    memory: dict[Buffer, torch.Tensor | Call | LayerGraph | Rerun] = field(default_factory=dict)
    gradients: dict[int, UnitGradient] = field(default_factory=dict)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    log_probs: dict[int, torch.Tensor] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    square_norms: dict[int, torch.Tensor] = field(default_factory=dict)

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

    @property
    def loss(self) -> float:
        """Sum over the micro-batches; waits for the device."""
        return float(sum(float(loss) for loss in self.losses.values()))

    def norm(self) -> float:
        """Global gradient norm, added up in one order whatever order downloads ended in."""
        return sum(float(self.square_norms[unit]) for unit in sorted(self.square_norms)) ** 0.5
