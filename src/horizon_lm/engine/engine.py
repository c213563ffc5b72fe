"""The engine: runs a step's schedule over a skeleton, a host store and device slots.

One table maps each op kind to its function (`ops`).

An exception may end a call between any two bytecodes. What a step has come to is therefore never noted beside
the work, where the note could be lost, but read off the work itself: `Update.progress` for the weights,
`steps_done` from the update that was last decided on. What a call left at work is ended before the next
(`come_back`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch

from horizon_lm.config import ModelSettings
from horizon_lm.engine import compute
from horizon_lm.engine.lanes import AdversarialLanes, Lanes, Span
from horizon_lm.engine.loss import IGNORE_INDEX, LossFunction, cross_entropy, custom, shifted_targets
from horizon_lm.engine.ops import OpFunctions
from horizon_lm.engine.policies import Policies
from horizon_lm.engine.saving import Saving
from horizon_lm.engine.step import MicroBatch, Schedule, Step, Update
from horizon_lm.memory.slots import BoundarySlots, GradientSlots, WeightSlots
from horizon_lm.memory.store import HostStore
from horizon_lm.model.attention import attention_restorer
from horizon_lm.model.capture import drop_captures
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer, UpdateSettings
from horizon_lm.schedule import Buffer, Op, StepPlan, build, build_flush, build_save, derive_waits, last_uses


class Engine(OpFunctions):
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
        self._step: Step | None = None  # whose gradients the store holds, whole
        self._steps_before = 0  # those done before `_update`
        self._update: Update | None = None  # the last that was decided on, or is under way (eager)
        self._is_mixed = False
        self._is_training: bool | None = True  # the mode of the model's modules; None where that is not known
        self._saving: Saving | None = None
        self._begins_to_save = False
        self._has_run_writes = False
        self._inside = threading.local()
        self.reruns: set[int] = set()
        self.notes: list[str] = []
        self.logs_notes = True
        self.spans: list[Span] = []
        self._spans_origin = 0.0
        self._run = self.table()
        self._is_at_work = False
        self._restorers = skeleton.restorer(), attention_restorer(), partial(drop_captures, skeleton)

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
    def steps_done(self) -> int:
        """Steps whose updates are made, or will be before anybody reads the weights."""
        update = self._update
        return self._steps_before if update is None else update.settings.step - (not update.counts)

    @property
    def has_pending(self) -> bool:
        """Whether updates that were decided on are still to be made (`update: deferred`, or an error)."""
        return self._update is not None and not self._update.eager and bool(self._update.left)

    @property
    def gradients(self) -> Step | None:
        """The step whose gradients are in the store and have not been learned from."""
        step = self._step
        usable = step is not None and step.number == self.steps_done and not step.ends_itself
        return step if usable else None

    @property
    def holds_gradients(self) -> bool:
        """Whether those in the store are of one step, be it learned from or not."""
        return self._step is not None

    def holds_gradients_of(self, step: Step) -> bool:
        return self._step is step

    @property
    def torn(self) -> str | None:
        """Why the weights are those of no step, in words; None for nearly all states."""
        if self._is_mixed:
            return "reading a saved state was cut short"
        update = self._update
        if update is None or not update.is_torn:
            return None
        number = f"{update.settings.step:,}"
        return f"{update.extent} were updated already (update: eager) when step {number} was cut short"

    @property
    def op_at_work(self) -> Op | None:
        """The op that the calling thread is in the middle of."""
        return getattr(self._inside, "op", None)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        update: UpdateSettings | None = None,
        loss_fn: LossFunction | None = None,
        record: bool = False,
        ends_itself: bool = False,
    ) -> Step:
        """Run gather to scatter, with the deferred updates of the step before, or with this step's own
        eager ones (`update`). Gradients are in the store, but for eager updates.

        A state of no step is taken as the one to go on from. ends_itself: see `Step`.
        """
        if self.torn:
            self.replaced(self.steps_done)
        if self.has_pending and (self._is_cut_short or self.settings.update_mode != "deferred"):
            self.flush()
        self._step = None  # with all that it holds: the memory may be needed
        self._set_mode(training=True)
        plan = self.plan(len(micro_batches), save=self._begins_to_save)
        step = self._begin(plan, micro_batches, self.steps_done, pending=self.has_pending)
        step.ends_itself = ends_itself
        if update is not None:
            self._update = step.update = Update.of(self.trainable, update, eager=True)
        elif self.has_pending:
            step.update = self._update
        self._prepare_losses(step, loss_fn)
        end = next(i for i, op in enumerate(step.schedule.ops) if op.kind == "N")
        self._has_run_writes = self._begins_to_save
        try:
            self._execute(step, range(end), record)
        except BaseException as error:
            self._give_up_saving()  # its units would be of two steps
            if self.torn:
                error.add_note(
                    f"{self.torn}: the weights are those of no step. Load the last saved model, or use "
                    "update: deferred"
                )
            raise
        self._end_of_writes()
        self._step = step
        return step

    def _prepare_losses(self, step: Step, loss_fn: LossFunction | None) -> None:
        step.metrics = [{} for _ in step.micro_batches]
        if loss_fn is None:
            smoothing = self.policies.settings.label_smoothing_factor
            head_loss = cross_entropy(step.num_tokens, self.policies.loss_chunk, smoothing)
            step.head_losses = [head_loss] * len(step.micro_batches)
        else:
            step.head_losses = [
                custom(loss_fn, batch, self.policies.loss_chunk, metrics)
                for batch, metrics in zip(step.micro_batches, step.metrics, strict=True)
            ]

    def evaluate(self, micro_batches: Sequence[MicroBatch], *, record: bool = False) -> Step:
        """Forward and loss alone, without dropout; losses and log-probabilities are in the step."""
        self.flush()
        plan = self.plan(len(micro_batches), evaluate=True)
        step = self._begin(plan, micro_batches, 0, pending=False)
        self._set_mode(training=False)
        try:
            self._execute(step, range(len(step.schedule.ops)), record)
        finally:
            self._set_mode(training=True)
        return step

    def _set_mode(self, *, training: bool) -> None:
        """Put the model into a mode; where that is cut short, the next call does it again."""
        if self._is_training is not training:
            self._is_training = None
            self.skeleton.model.train(training)
            self._is_training = training

    def _begin(
        self, plan: StepPlan, micro_batches: Sequence[MicroBatch], number: int, *, pending: bool
    ) -> Step:
        targets = [shifted_targets(batch["labels"]) for batch in micro_batches]
        if self.device.type == "cuda":  # copies from pageable memory would hold up the compute lane
            targets = [t.pin_memory() for t in targets]
            micro_batches = [
                {n: v.pin_memory() for n, v in batch.items() if v is not None} for batch in micro_batches
            ]
        num_tokens = sum(int((t != IGNORE_INDEX).sum()) for t in targets)
        rng_base = self.settings.seed * 1_000_003 + number
        schedule = self.schedule(plan, pending=pending)
        return Step(plan, schedule, micro_batches, targets, num_tokens, number, rng_base)

    def update(self, step: Step, settings: UpdateSettings, *, record: bool = False) -> None:
        """Take the norm of the gradients of `step`, which the store holds, and update: at once, or with the
        next step. Once the norm is taken the update is decided on, and `flush` makes what is left of it."""
        assert self.holds_gradients_of(step), "update() needs a forward_backward() before it"
        ops = step.schedule.ops
        if step.plan.update != "eager":
            step.update = Update.of(self.trainable, settings)
        norm = next(i for i, op in enumerate(ops) if op.kind == "N")
        self._execute(step, range(norm, norm + 1), record)
        self._update = step.update
        if norm + 1 < len(ops):
            self._execute(step, range(norm + 1, len(ops)), record)

    def flush(self) -> None:
        """Make the updates that are still to come, so that the store holds what the last step decided."""
        update = self._update
        if update is None or not self.has_pending:
            return
        ops = build_flush(self.plan(1), 0, update.left)
        self._execute(self._apart(ops, update), range(len(ops)), False)

    def _apart(self, ops: list[Op], update: Update | None, *, save: bool = False) -> Step:
        """A step of nothing but these ops."""
        schedule = Schedule(ops, derive_waits(ops), last_uses(ops))
        return Step(self.plan(1, save=save), schedule, update=update)

    @property
    def _is_cut_short(self) -> bool:
        return self._update is not None and self._update.has_begun and bool(self._update.left)

    def is_being_replaced(self) -> None:
        """The store is about to be filled anew: until `replaced` its content is of no step."""
        self.flush()
        self.replaced(self.steps_done)
        self._is_mixed = True

    def replaced(self, steps_done: int) -> None:
        """Take the store as it is for the state after so many steps; drop updates and gradients."""
        self._steps_before, self._update, self._step, self._is_mixed = steps_done, None, None, False

    def save(self, saving: Saving, *, background: bool) -> None:
        """Write every unit, as the last step's update leaves it: while the next step and those after it
        run (`background`), or at once. Waits for what is being saved already."""
        self.lanes.disk.drain()
        self.lanes.disk.give_up = saving.abandon
        self._saving, self._begins_to_save = saving, True
        if background:
            return
        update = self._update if self.has_pending else None
        ops = build_save(self.plan(1, save=True), 1, update.left if update is not None else ())
        self._has_run_writes = True
        try:
            self._execute(self._apart(ops, update, save=True), range(len(ops)), False)
        except BaseException:
            self._give_up_saving()
            raise
        self._end_of_writes()
        self.lanes.disk.drain()

    def finish_saving(self) -> None:
        """Write at once what was to be written beside a step that has not come; wait for the disk."""
        if self._saving is not None and self._begins_to_save:
            self.save(self._saving, background=False)
        self.lanes.disk.drain()

    def come_back(self) -> None:
        """End what the last call left at work, or half written, when it was interrupted. Comes before each
        call."""
        self.lanes.join()
        if self._is_at_work:
            for restore in self._restorers:
                restore()
            self._is_at_work = False
        if self._has_run_writes:
            self._give_up_saving()

    def _give_up_saving(self) -> None:
        """Drop the checkpoint whose units a failed run was to write."""
        if self._saving is not None and self._begins_to_save:
            self._saving.abandon()
            self.lanes.disk.clear()
        self._end_of_writes()

    def _end_of_writes(self) -> None:
        """What was to be written is on its way: the disk lane ends the checkpoint when it comes to it."""
        if self._saving is not None and self._begins_to_save:
            self.lanes.disk.submit(frozenset(), self._saving.finish)
        self._begins_to_save = self._has_run_writes = False

    def _execute(self, step: Step, indices: range, record: bool) -> None:
        schedule = step.schedule

        def execute(i: int) -> None:
            op = self._inside.op = schedule.ops[i]
            try:
                self._run[op.kind](step, op)
            finally:
                self._inside.op = None
            for buffer in schedule.ends[i]:
                self._release(step, buffer)

        self._is_at_work = True
        try:
            self.lanes.run(schedule.ops, schedule.waits, indices, execute, record=record)
        except Exception:  # which has put everything back on its way
            self._is_at_work = False
            raise
        self._is_at_work = False
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
