"""The engine: runs a step's schedule over a skeleton, a host store and device slots.

One table maps each op kind to its function; an op's function is handed the op, and takes its
slots and buffers by the numbers that the schedule gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from ..memory.slots import GradientSlots, UnitWeights, WeightSlots
from ..memory.store import HostStore
from ..model.capture import Call
from ..model.skeleton import Skeleton
from ..optim.optimizer import Optimizer
from ..schedule import Buffer, Op, StepPlan, build, derive_waits, last_uses
from . import compute
from .lanes import AdversarialLanes, Lanes, Span
from .loss import IGNORE_INDEX, chunk_tokens, shifted_targets
from .transfer import square_norm

MicroBatch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class UpdateSettings:
    """What a call of `step` asks for. step: number of this update, from 1."""

    step: int
    lr: float
    max_grad_norm: float | None
    weight_decay: float


@dataclass
class _Step:
    """The step in flight: its schedule, its micro-batches and its transient buffers."""

    ops: list[Op]
    waits: list[tuple[int, ...]]
    ends: list[tuple[Buffer, ...]]
    micro_batches: Sequence[MicroBatch]
    targets: list[torch.Tensor]
    num_tokens: int
    lowest_backward: int
    memory: dict[Buffer, torch.Tensor | Call] = field(default_factory=dict)
    graphs: dict[tuple[int, int], compute.LayerGraph] = field(default_factory=dict)  # by unit, micro-batch
    gradients: dict[int, compute.UnitGradient] = field(default_factory=dict)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    square_norms: dict[int, torch.Tensor] = field(default_factory=dict)
    grad_norm: float = float("nan")
    clip: float = 1.0
    settings: UpdateSettings | None = None

    def tensor(self, region: str, index: int, micro_batch: int) -> torch.Tensor:
        value = self.memory[Buffer(region, index, micro_batch)]
        assert isinstance(value, torch.Tensor)
        return value

    def call(self, micro_batch: int) -> Call:
        value = self.memory[Buffer("call", -1, micro_batch)]
        assert isinstance(value, Call)
        return value


class Engine:
    """Executes training steps. device: where units compute; lanes: how ops are run."""

    def __init__(
        self,
        skeleton: Skeleton,
        store: HostStore,
        optimizer: Optimizer,
        device: torch.device,
        lanes: Lanes,
        *,
        slots: int,
        grad_slots: int,
        loss_chunk: int | str,
        seed: int,
    ) -> None:
        self.skeleton, self.store, self.optimizer = skeleton, store, optimizer
        self.device, self.lanes, self.seed = device, lanes, seed
        self.slots, self.grad_slots = slots, grad_slots
        self.loss_chunk = min(chunk_tokens(loss_chunk, skeleton.vocabulary), skeleton.max_head_tokens)
        streamed = range(skeleton.head + 1)
        self.uploaded = frozenset(u for u in streamed if store.units[u].numel)
        self.trainable = frozenset(
            u for u in {*streamed, skeleton.embedding_unit} if store.units[u].trainable_numel
        )
        alias = device.type == "cpu" and not isinstance(lanes, AdversarialLanes)
        self.weight_slots = WeightSlots(store, self.uploaded, slots, device, alias)
        downloaded = self.trainable & frozenset(streamed)
        self.gradient_slots = GradientSlots(store, downloaded, grad_slots, device, alias)
        self._poison = isinstance(lanes, AdversarialLanes)
        self._schedules: dict[int, tuple[list[Op], list[tuple[int, ...]], list[tuple[Buffer, ...]]]] = {}
        self._embedding = compute.host_embedding(skeleton)
        self._step: _Step | None = None
        self.spans: list[Span] = []
        self._spans_origin = 0.0
        self._run: dict[str, Callable[[_Step, Op], None]] = {
            "G": self._gather,
            "U": self._upload,
            "F": self._forward,
            "L": self._loss,
            "B": self._backward,
            "D": self._download,
            "S": self._scatter,
            "N": self._norm,
            "O": self._optimize,
        }

    def plan(self, micro_batches: int) -> StepPlan:
        """The plan of a step of so many micro-batches."""
        return StepPlan(
            layers=self.skeleton.num_layers,
            uploaded=self.uploaded,
            trainable=self.trainable,
            embedding_unit=self.skeleton.embedding_unit,
            micro_batches=micro_batches,
            slots=self.slots,
            grad_slots=self.grad_slots,
            embedding_frozen=not self.store.locate(self.skeleton.anatomy.embedding)[1].trainable,
        )

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], num_step: int, *, record: bool = False
    ) -> tuple[float, int]:
        """Run gather to scatter. Returns (loss, target tokens); gradients are in the store."""
        targets = [shifted_targets(batch["labels"]) for batch in micro_batches]
        if self.device.type == "cuda":  # copies from pageable memory would hold up the compute lane
            targets = [t.pin_memory() for t in targets]
            micro_batches = [
                {n: v.pin_memory() for n, v in batch.items() if v is not None} for batch in micro_batches
            ]
        num_tokens = sum(int((t != IGNORE_INDEX).sum()) for t in targets)
        count = len(micro_batches)
        if count not in self._schedules:
            ops = build(self.plan(count))
            self._schedules[count] = ops, derive_waits(ops), last_uses(ops)
        ops, waits, ends = self._schedules[count]
        lowest = self.plan(count).lowest_backward
        step = _Step(ops, waits, ends, micro_batches, targets, num_tokens, lowest)
        self._step, self._rng_base = step, self.seed * 1_000_003 + num_step
        first_update = next(i for i, op in enumerate(ops) if op.is_update)
        self._execute(step, range(first_update), record)
        return float(sum(float(loss) for loss in step.losses.values())), num_tokens

    def update(self, settings: UpdateSettings, *, record: bool = False) -> float:
        """Run the norm and the optimizer on the gradients in the store. Returns the global norm."""
        step = self._step
        assert step is not None, "update() needs a forward_backward() before it"
        step.settings = settings
        first_update = next(i for i, op in enumerate(step.ops) if op.is_update)
        self._execute(step, range(first_update, len(step.ops)), record)
        return step.grad_norm

    def measure_norm(self) -> float:
        """Global gradient norm of the last forward_backward, without an update."""
        assert self._step is not None
        for unit in self.trainable:
            self._measure(self._step, unit)
        squares = self._step.square_norms  # filled in whatever order downloads ended: added up in one order
        return sum(float(squares[unit]) for unit in sorted(squares)) ** 0.5

    def _measure(self, step: _Step, unit: int) -> None:
        """Take the norm of a gradient that was at home from the start, and so was not downloaded."""
        if unit not in step.square_norms:
            step.square_norms[unit] = square_norm(self.store.run("grads", unit))

    def _execute(self, step: _Step, indices: range, record: bool) -> None:
        def execute(i: int) -> None:
            op = step.ops[i]
            self._run[op.kind](step, op)
            for buffer in step.ends[i]:
                self._release(step, buffer)

        self.lanes.run(step.ops, step.waits, indices, execute, record=record)
        if indices.start == 0:
            self.spans, self._spans_origin = [], self.lanes.origin
        later = self.lanes.origin - self._spans_origin  # an update's spans follow those of its gradients
        self.spans += [(op, start + later, end + later) for op, start, end in self.lanes.spans]

    def _release(self, step: _Step, buffer: Buffer) -> None:
        """Drop a buffer after its last use; adversarial lanes fill it with NaN first."""
        if self._poison:
            if buffer.region == "slot":
                self.weight_slots.poison(buffer.index)
            elif buffer.region == "grad_slot":
                self.gradient_slots.poison(buffer.index)
            else:
                value = step.memory.get(buffer)
                if isinstance(value, torch.Tensor):
                    value.fill_(torch.nan)
        step.memory.pop(buffer, None)

    # One function for each op kind.

    def _gather(self, step: _Step, op: Op) -> None:
        table = self.store.weight(self.skeleton.anatomy.embedding)
        ids = step.micro_batches[op.micro_batch]["input_ids"]
        embeds = compute.gather_rows(self._embedding, table, ids)
        if self.device.type == "cuda":
            embeds = embeds.pin_memory()
        step.memory[Buffer("embeds", -1, op.micro_batch)] = embeds

    def _upload(self, step: _Step, op: Op) -> None:
        self.weight_slots.upload(op.slot, op.unit)

    def _forward(self, step: _Step, op: Op) -> None:
        m = op.micro_batch
        with self._random_state(op):
            if op.unit == 0:
                embeds = step.tensor("embeds", -1, m).to(self.device, non_blocking=True)
                output, call = compute.forward_prologue(
                    self.skeleton, self._weights(op), embeds, self._inputs(step, m)
                )
                step.memory[Buffer("call", -1, m)] = call
            else:
                hidden = step.tensor("input", op.unit, m)
                grad = op.unit >= step.lowest_backward
                # The last layer's backward follows the head at once, with its weights still in their
                # slot: with one micro-batch its activations are kept rather than computed again.
                turn = op.unit == self.skeleton.num_layers and len(step.micro_batches) == 1
                output, graph = compute.forward_layer(
                    self.skeleton,
                    op.unit - 1,
                    self._weights(op),
                    step.call(m),
                    hidden,
                    grad=grad,
                    recompute=not turn,
                )
                if graph is not None:
                    step.graphs[op.unit, m] = graph
        step.memory[Buffer("input", op.unit + 1, m)] = output

    def _loss(self, step: _Step, op: Op) -> None:
        m = op.micro_batch
        loss, gradient = compute.loss_and_backward(
            self.skeleton,
            self._weights(op),
            step.call(m),
            step.tensor("input", op.unit, m),
            step.targets[m],
            self._gradient(step, op),
            num_tokens=step.num_tokens,
            chunk=self.loss_chunk,
        )
        step.losses[m] = loss
        step.memory[Buffer("input_grad", -1, m)] = gradient

    def _backward(self, step: _Step, op: Op) -> None:
        m = op.micro_batch
        gradient = step.tensor("input_grad", -1, m)
        with self._random_state(op):
            if op.unit == 0:
                embeds = step.tensor("embeds", -1, m).to(self.device, non_blocking=True)
                gradient = compute.backward_prologue(
                    self.skeleton,
                    self._weights(op),
                    embeds,
                    self._inputs(step, m),
                    gradient,
                    self._gradient(step, op),
                )
                step.memory[Buffer("embeds_grad", -1, m)] = self._to_host(gradient)
                return
            step.memory[Buffer("input_grad", -1, m)] = compute.backward_layer(
                self.skeleton,
                op.unit - 1,
                self._weights(op),
                step.call(m),
                step.graphs.pop((op.unit, m)),
                gradient,
                self._gradient(step, op),
            )

    def _download(self, step: _Step, op: Op) -> None:
        gradient = step.gradients.pop(op.unit)
        square = gradient.download(self.store.run("grads", op.unit))
        if square is not None:
            step.square_norms[op.unit] = square

    def _scatter(self, step: _Step, op: Op) -> None:
        skeleton = self.skeleton
        name = skeleton.anatomy.embedding
        ids = [batch["input_ids"] for batch in step.micro_batches]
        gradients = [step.tensor("embeds_grad", -1, m) for m in range(len(ids))]
        rows, values = compute.row_gradients(
            self._embedding, self.store.weight(name), ids, gradients, padding_row=skeleton.padding_row
        )
        table = self.store.gradient(name)
        before = 0.0
        if skeleton.anatomy.tied:
            self._measure(step, skeleton.head)
            held = table[rows]
            before = float(held.double().square().sum())
            table[rows] = (held + values).to(table.dtype)
        else:
            table.zero_()
            table[rows] = values.to(table.dtype)
        after = float(table[rows].double().square().sum())
        # A tied head's own norm was taken as it was downloaded; what the rows add to it is known here.
        step.square_norms[skeleton.head + 1] = torch.tensor(after - before, dtype=torch.float64)

    def _norm(self, step: _Step, op: Op) -> None:
        assert step.settings is not None
        step.grad_norm = self.measure_norm()
        limit = step.settings.max_grad_norm
        step.clip = min(1.0, limit / (step.grad_norm + 1e-6)) if limit else 1.0  # as clip_grad_norm_

    def _optimize(self, step: _Step, op: Op) -> None:
        settings = step.settings
        assert settings is not None
        self.optimizer.update_unit(
            self.store,
            op.unit,
            step=settings.step,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            grad_scale=step.clip,
        )

    # What the functions above are handed.

    def _weights(self, op: Op) -> UnitWeights | None:
        return self.weight_slots.unit(op.slot, op.unit) if op.slot >= 0 else None

    def _gradient(self, step: _Step, op: Op) -> compute.UnitGradient | None:
        if op.grad_slot < 0:
            return None
        if op.first:
            additions = len(step.micro_batches)
            if op.unit == self.skeleton.head:
                additions = max(
                    additions, *(-(-t.numel() // self.loss_chunk) * additions for t in step.targets)
                )
            dtype = self.store.dtype if additions == 1 else torch.float32
            run = self.gradient_slots.run(op.grad_slot, op.unit, dtype)
            at_home = self.gradient_slots.is_alias(dtype)
            step.gradients[op.unit] = compute.UnitGradient(self.store.units[op.unit], run, at_home=at_home)
        return step.gradients[op.unit]

    def _inputs(self, step: _Step, m: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "position_ids")
        batch = step.micro_batches[m]
        return {n: batch[n].to(self.device, non_blocking=True) for n in names if batch.get(n) is not None}

    def _to_host(self, value: torch.Tensor) -> torch.Tensor:
        if value.device.type == "cpu":
            return value
        staging = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return staging.copy_(value, non_blocking=True)

    def _random_state(self, op: Op) -> AbstractContextManager[None]:
        return compute.random_state(self.skeleton, self.device, self._rng_base, op.unit, op.micro_batch)
