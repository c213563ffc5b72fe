"""The engine: runs a step's schedule over a skeleton, a host store and device slots.

One table maps each op kind to its function; an op's function is handed the op, and takes its
slots and buffers by the numbers that the schedule gave it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from ..config import ModelSettings
from ..memory.slots import BoundarySlots, GradientSlots, UnitWeights, WeightSlots
from ..memory.store import HostStore
from ..model.skeleton import Skeleton
from ..optim.optimizer import Optimizer, UpdateSettings
from ..schedule import Buffer, Op, StepPlan, build, build_flush, build_save, derive_waits, last_uses
from ..schedule.step_plan import KEEP
from . import activations, compute
from .gradient import UnitGradient
from .lanes import AdversarialLanes, Lanes, Span, reads_on_this_lane
from .loss import (
    IGNORE_INDEX,
    LossFunction,
    cross_entropy,
    custom,
    log_probabilities,
    shifted_targets,
)
from .policies import Policies
from .saving import Saving
from .step import MicroBatch, Schedule, Step, Update
from .transfer import square_norm

_log = logging.getLogger(__name__)


class Engine:
    """Executes training steps. device: where units compute; lanes: how ops are run."""

    def __init__(
        self,
        skeleton: Skeleton,
        store: HostStore,
        optimizer: Optimizer,
        device: torch.device,
        lanes: Lanes,
        settings: ModelSettings,
    ) -> None:
        self.skeleton, self.store, self.optimizer = skeleton, store, optimizer
        self.device, self.lanes, self.settings = device, lanes, settings
        self.policies = Policies.of(settings, skeleton)
        self.uploaded, self.trainable = self.policies.uploaded, self.policies.trainable
        alias = device.type == "cpu" and not isinstance(lanes, AdversarialLanes)
        self.weight_slots = WeightSlots(store, self.uploaded, self.policies.slots, device, alias)
        downloaded = frozenset(u for u in self.trainable if u <= skeleton.head)
        self.gradient_slots = GradientSlots(store, downloaded, self.policies.grad_slots, device, alias)
        self.boundary_slots = BoundarySlots(settings.boundary_slots, device, alias)
        self._poison = isinstance(lanes, AdversarialLanes)
        self._schedules: dict[tuple[StepPlan, bool], Schedule] = {}
        self._embedding = compute.host_embedding(skeleton)
        self._step: Step | None = None
        self._pending: Update | None = None
        self._saving: Saving | None = None
        self._begins_to_save = False
        self.spans: list[Span] = []
        self._spans_origin = 0.0
        self._run: dict[str, Callable[[Step, Op], None]] = {
            "G": self._gather,
            "U": self._upload,
            "F": self._forward,
            "X": self._spill,
            "L": self._loss,
            "E": self._evaluate,
            "R": self._restore,
            "C": self._recompute,
            "B": self._backward,
            "D": self._download,
            "S": self._scatter,
            "N": self._norm,
            "O": self._optimize,
            "W": self._write,
        }

    def plan(self, micro_batches: int, *, evaluate: bool = False, save: bool = False) -> StepPlan:
        """The plan of a step of so many micro-batches. save: a checkpoint is written while it runs."""
        saved = frozenset(u for u, unit in enumerate(self.store.units) if unit.numel * save)
        return self.policies.step_plan(micro_batches, evaluate=evaluate, saved=saved)

    def schedule(self, plan: StepPlan, *, pending: bool = False) -> Schedule:
        """The schedule of a step, made once. pending: it begins with the updates of the step before."""
        if (plan, pending) not in self._schedules:
            ops = build(plan, step=1, pending=plan.trainable if pending else ())
            self._schedules[plan, pending] = Schedule(ops, derive_waits(ops), last_uses(ops))
        return self._schedules[plan, pending]

    @property
    def has_pending(self) -> bool:
        """Whether updates that were decided on are still to be made (`update: deferred`)."""
        return self._pending is not None and bool(self._pending.left)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        num_step: int,
        *,
        update: UpdateSettings | None = None,
        loss_fn: LossFunction | None = None,
        record: bool = False,
    ) -> Step:
        """Run gather to scatter, with the deferred updates of the step before, or with this step's own
        eager ones (`update`). Gradients are in the store, but for eager updates."""
        if self._pending is not None and self._pending.begun:  # a step that failed half-way
            self.flush()
        plan = self.plan(len(micro_batches), save=self._begins_to_save)
        step = self._step = self._begin(plan, micro_batches, num_step, pending=self.has_pending)
        if update is not None:
            step.update = Update(update, 1.0, set(self.trainable))
        elif self.has_pending:
            step.update = self._pending
        step.metrics = [{} for _ in micro_batches]
        if loss_fn is None:
            step.head_losses = [cross_entropy(step.num_tokens, self.policies.loss_chunk)] * len(micro_batches)
        else:
            step.head_losses = [
                custom(loss_fn, batch, self.policies.loss_chunk, metrics)
                for batch, metrics in zip(micro_batches, step.metrics, strict=True)
            ]
        end = next(i for i, op in enumerate(step.schedule.ops) if op.kind == "N")
        try:
            self._execute(step, range(end), record)
        except BaseException:
            if self._saving is not None and self._begins_to_save:
                self._saving.abandon()  # its units would be of two steps
                self.lanes.disk.clear()
            self._end_of_writes()
            raise
        self._end_of_writes()
        if not self.has_pending:
            self._pending = None
        return step

    def evaluate(self, micro_batches: Sequence[MicroBatch], *, record: bool = False) -> Step:
        """Forward and loss alone, without dropout; losses and log-probabilities are in the step."""
        self.flush()
        step = self._begin(self.plan(len(micro_batches), evaluate=True), micro_batches, 0, pending=False)
        self.skeleton.model.eval()
        try:
            self._execute(step, range(len(step.schedule.ops)), record)
        finally:
            self.skeleton.model.train()
        return step

    def _begin(
        self, plan: StepPlan, micro_batches: Sequence[MicroBatch], num_step: int, *, pending: bool
    ) -> Step:
        targets = [shifted_targets(batch["labels"]) for batch in micro_batches]
        if self.device.type == "cuda":  # copies from pageable memory would hold up the compute lane
            targets = [t.pin_memory() for t in targets]
            micro_batches = [
                {n: v.pin_memory() for n, v in batch.items() if v is not None} for batch in micro_batches
            ]
        num_tokens = sum(int((t != IGNORE_INDEX).sum()) for t in targets)
        rng_base = self.settings.seed * 1_000_003 + num_step
        schedule = self.schedule(plan, pending=pending)
        return Step(plan, schedule, micro_batches, targets, num_tokens, rng_base)

    def update(self, settings: UpdateSettings, *, record: bool = False) -> None:
        """Take the norm of the gradients in the store and update: at once, or with the next step."""
        step = self._step
        assert step is not None, "update() needs a forward_backward() before it"
        ops = step.schedule.ops
        if step.plan.update != "eager":
            step.update = Update(settings, 1.0, set(self.trainable))
        self._execute(step, range(next(i for i, op in enumerate(ops) if op.kind == "N"), len(ops)), record)
        if step.plan.update == "deferred":
            self._pending = step.update

    def flush(self) -> None:
        """Make the updates that are still to come, so that the store holds what the last step decided."""
        update = self._pending
        if update is None:
            return
        plan = self.plan(1)
        ops = build_flush(plan, 0, update.left)
        step = Step(plan, Schedule(ops, derive_waits(ops), last_uses(ops)), update=update)
        self._execute(step, range(len(ops)), False)
        self._pending = None

    def forget(self) -> None:
        """Drop updates and gradients that are still to be applied: the store was filled anew."""
        self._pending = self._step = None

    def save(self, saving: Saving, *, background: bool) -> None:
        """Write every unit, as the last step's update leaves it: while the next step and those after it
        run (`background`), or at once. Waits for what is being saved already."""
        self.lanes.disk.drain()
        self.lanes.disk.give_up = saving.abandon
        self._saving, self._begins_to_save = saving, True
        if background:
            return
        update = self._pending
        plan = self.plan(1, save=True)
        ops = build_save(plan, 1, update.left if update is not None else ())
        step = Step(plan, Schedule(ops, derive_waits(ops), last_uses(ops)), update=update)
        self._execute(step, range(len(ops)), False)
        self._pending = None
        self._end_of_writes()
        self.lanes.disk.drain()

    def _end_of_writes(self) -> None:
        """What was to be written is on its way: the disk lane ends the checkpoint when it comes to it."""
        if self._saving is not None and self._begins_to_save:
            self.lanes.disk.submit(frozenset(), self._saving.finish)
            self._begins_to_save = False

    def measure_norm(self) -> float:
        """Global gradient norm of the last forward_backward, without an update."""
        assert self._step is not None
        if self._step.plan.update != "eager":
            for unit in self.trainable:
                self._measure(self._step, unit)
        return self._step.norm()

    def _measure(self, step: Step, unit: int) -> None:
        """Take the norm of a gradient that was at home from the start, and so was not downloaded."""
        if unit not in step.square_norms:
            step.square_norms[unit] = square_norm(self.store.run("grads", unit))

    def _execute(self, step: Step, indices: range, record: bool) -> None:
        schedule = step.schedule

        def execute(i: int) -> None:
            op = schedule.ops[i]
            self._run[op.kind](step, op)
            for buffer in schedule.ends[i]:
                self._release(step, buffer)

        self.lanes.run(schedule.ops, schedule.waits, indices, execute, record=record)
        if indices.start == 0:
            self.spans, self._spans_origin = [], self.lanes.origin
        later = self.lanes.origin - self._spans_origin  # an update's spans follow those of its gradients
        self.spans += [(op, start + later, end + later) for op, start, end in self.lanes.spans]

    def _release(self, step: Step, buffer: Buffer) -> None:
        """Drop a buffer after its last use; adversarial lanes fill it with NaN first."""
        if self._poison:
            self._fill_with_nan(step, buffer)
        step.memory.pop(buffer, None)

    def _fill_with_nan(self, step: Step, buffer: Buffer) -> None:
        slots: dict[str, WeightSlots | GradientSlots | BoundarySlots] = {
            "slot": self.weight_slots,
            "grad_slot": self.gradient_slots,
            "boundary_slot": self.boundary_slots,
        }
        if buffer.region in slots:
            slots[buffer.region].poison(buffer.index)
        elif buffer.region == "slab":
            self.store.run("grad_slabs", buffer.index).fill_(torch.nan)
        else:
            value = step.memory.get(buffer)
            if isinstance(value, torch.Tensor):
                value.fill_(torch.nan)

    # One function for each op kind.

    def _gather(self, step: Step, op: Op) -> None:
        table = self.store.weight(self.skeleton.anatomy.embedding)
        ids = step.micro_batches[op.micro_batch]["input_ids"]
        embeds = compute.gather_rows(self._embedding, table, ids)
        if self.device.type == "cuda":
            embeds = embeds.pin_memory()
        step.memory[Buffer("embeds", -1, op.micro_batch)] = embeds

    def _upload(self, step: Step, op: Op) -> None:
        self.weight_slots.upload(op.slot, op.unit)

    def _forward(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        with self._random_state(step, op):
            if op.unit == 0:
                embeds = step.tensor("embeds", -1, m).to(self.device, non_blocking=True)
                output, call = compute.forward_prologue(
                    self.skeleton, self._weights(op), embeds, self._inputs(step, m)
                )
                step.memory[Buffer("call", -1, m)] = call
            else:
                output = self._forward_layer(step, op)
        step.memory[Buffer("input", op.unit + 1, m)] = output

    def _forward_layer(self, step: Step, op: Op) -> torch.Tensor:
        call, hidden = step.call(op.micro_batch), step.tensor("input", op.unit, op.micro_batch)
        done = activations.forward_layer(
            self.skeleton,
            op.unit - 1,
            self._weights(op),
            call,
            hidden,
            policy=op.policy,
            grad=not step.plan.evaluate and op.unit >= step.plan.lowest_backward,
        )
        if isinstance(done.graph, activations.Rerun):
            self._fall_back(op.unit)
        if done.graph is not None:
            step.memory[Buffer("graph", op.unit, op.micro_batch)] = done.graph
        call.routers.append(done.routers)
        return done.output

    def _fall_back(self, unit: int) -> None:
        """From the next step on the layer is computed again."""
        if unit in self.policies.kept:
            _log.warning(
                "%s keeps weights where they cannot be replaced: its activations are recomputed, not kept",
                self.store.units[unit].name,
            )
        self.policies = replace(self.policies, kept=self.policies.kept - {unit})

    def _spill(self, step: Step, op: Op) -> None:
        value = step.tensor("input", op.unit, op.micro_batch)
        reads_on_this_lane(value)
        home = self.boundary_slots.spill(op.unit, op.micro_batch, value)
        step.memory[Buffer("boundary", op.unit, op.micro_batch)] = home

    def _restore(self, step: Step, op: Op) -> None:
        self.boundary_slots.restore(op.boundary_slot, step.tensor("boundary", op.unit, op.micro_batch))

    def _recompute(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        with self._random_state(step, op):
            done = activations.forward_layer(
                self.skeleton,
                op.unit - 1,
                self._weights(op),
                step.call(m),
                self._stored_input(step, op),
                policy=KEEP,
                grad=True,
                in_place=True,
            )
        assert done.graph is not None
        step.memory[Buffer("graph", op.unit, m)] = done.graph
        step.memory[Buffer("input", op.unit + 1, m)] = done.output

    def _loss(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        loss, gradient = compute.loss_and_backward(
            self.skeleton,
            self._weights(op),
            step.call(m),
            step.tensor("input", op.unit, m),
            step.targets[m],
            self._gradient(step, op),
            step.head_losses[m],
            num_tokens=step.num_tokens,
        )
        step.losses[m] = loss
        step.memory[Buffer("input_grad", -1, m)] = gradient

    def _evaluate(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        step.call(m)
        with self.skeleton.bound(op.unit, self._weights(op), grad=False):
            found = log_probabilities(
                self.skeleton, step.tensor("input", op.unit, m), step.targets[m], self.policies.loss_chunk
            )
        step.log_probs[m] = found[:, :-1]
        step.losses[m] = -found.double().sum() / max(1, step.num_tokens)

    def _backward(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        gradient = step.tensor("input_grad", -1, m)
        with self._random_state(step, op):
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
            step.memory[Buffer("input_grad", -1, m)] = activations.backward_layer(
                self.skeleton,
                op.unit - 1,
                self._weights(op),
                step.call(m),
                step.graph(op.unit, m),
                self._stored_input(step, op),
                gradient,
                self._gradient(step, op),
            )

    def _download(self, step: Step, op: Op) -> None:
        gradient = step.gradients.pop(op.unit)
        home = self.store.gradient_run(op.unit, op.slab)
        square = gradient.download(home, measure=step.plan.update == "eager")
        if square is not None:
            step.square_norms[op.unit] = square

    def _scatter(self, step: Step, op: Op) -> None:
        skeleton = self.skeleton
        name = skeleton.anatomy.embedding
        ids = [batch["input_ids"] for batch in step.micro_batches]
        gradients = [step.tensor("embeds_grad", -1, m) for m in range(len(ids))]
        rows, values = compute.row_gradients(
            self._embedding, self.store.weight(name), ids, gradients, padding_row=skeleton.padding_row
        )
        table = self.store.gradient(name, op.slab)
        before = torch.zeros((), dtype=torch.float64)
        if skeleton.anatomy.tied:
            if op.slab < 0:
                self._measure(step, skeleton.head)
            held = table[rows]
            before = square_norm(held.view(-1))
            table[rows] = (held + values).to(table.dtype)
        else:
            self.store.gradient_run(skeleton.embedding_unit, op.slab).zero_()
            table[rows] = values.to(table.dtype)
        after = square_norm(table[rows].view(-1))
        # A tied head's own norm was taken as it was downloaded; what the rows add to it is known here.
        step.square_norms[skeleton.head + 1] = after - before

    def _norm(self, step: Step, op: Op) -> None:
        norm = self.measure_norm()
        assert step.update is not None
        limit = step.update.settings.max_grad_norm
        step.update.grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # as clip_grad_norm_

    def _optimize(self, step: Step, op: Op) -> None:
        update = step.update
        assert update is not None
        if step.plan.update == "eager" and not self._may_update(step, update, op.unit):
            return
        update.begun = True
        grads = self.store.gradient_run(op.unit, op.slab)
        self.optimizer.update_unit(self.store, op.unit, grads, update.settings, update.grad_scale)
        update.left.discard(op.unit)

    def _write(self, step: Step, op: Op) -> None:
        assert self._saving is not None
        self._saving.write_unit(op.unit)

    def _may_update(self, step: Step, update: Update, unit: int) -> bool:
        """Eager updates look before each: at the loss, which is known before any, and at the gradient's
        own norm. Once one is not finite, all that would follow are left out."""
        if update.stopped_at is None:
            square = float(step.square_norms[unit])
            if step.plan.scatters and unit == step.plan.embedding_unit:
                square += float(step.square_norms[step.plan.head + 1])
            finite = math.isfinite(square) and (update.begun or math.isfinite(step.loss))
            if not finite:
                update.stopped_at = unit
        return update.stopped_at is None

    # What the functions above are handed.

    def _weights(self, op: Op) -> UnitWeights | None:
        return self.weight_slots.unit(op.slot, op.unit) if op.slot >= 0 else None

    def _stored_input(self, step: Step, op: Op) -> torch.Tensor:
        if op.boundary_slot >= 0:
            return self.boundary_slots.held(op.boundary_slot)
        return step.tensor("input", op.unit, op.micro_batch)

    def _gradient(self, step: Step, op: Op) -> UnitGradient | None:
        if op.grad_slot < 0:
            return None
        if op.first:
            token_counts = [t.numel() for t in step.targets]
            dtype = self.policies.gradient_dtype(op.unit, token_counts, self.store.dtype)
            at_home = self.gradient_slots.is_alias(dtype)
            if at_home:
                run = self.store.gradient_run(op.unit, step.plan.slab(op.unit))
            else:
                run = self.gradient_slots.run(op.grad_slot, op.unit, dtype)
            # Adversarial lanes stand for a device, which writes its slot with the first gradient.
            adds = not self._poison and self.policies.adds_gradients(op.unit, token_counts)
            layout = self.store.units[op.unit]
            step.gradients[op.unit] = UnitGradient(layout, run, at_home=at_home, adds=adds)
        return step.gradients[op.unit]

    def _inputs(self, step: Step, m: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "position_ids")
        batch = step.micro_batches[m]
        return {n: batch[n].to(self.device, non_blocking=True) for n in names if batch.get(n) is not None}

    def _to_host(self, value: torch.Tensor) -> torch.Tensor:
        if value.device.type == "cpu":
            return value
        staging = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return staging.copy_(value, non_blocking=True)

    def _random_state(self, step: Step, op: Op) -> AbstractContextManager[None]:
        return compute.random_state(self.skeleton, self.device, step.rng_base, op.unit, op.micro_batch)
