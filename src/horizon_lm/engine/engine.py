"""The engine: runs a step's schedule over a skeleton, a host store and device slots.

One table maps each op kind to its function (`ops`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import ModelSettings
from ..memory.slots import BoundarySlots, GradientSlots, WeightSlots
from ..memory.store import HostStore
from ..model.skeleton import Skeleton
from ..optim.optimizer import Optimizer, UpdateSettings
from ..schedule import Buffer, StepPlan, build, build_flush, build_save, derive_waits, last_uses
from . import compute
from .lanes import AdversarialLanes, Lanes, Span
from .loss import (
    IGNORE_INDEX,
    LossFunction,
    cross_entropy,
    custom,
    shifted_targets,
)
from .ops import OpFunctions
from .policies import Policies
from .saving import Saving
from .step import MicroBatch, Schedule, Step, Update


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
        self._step: Step | None = None
        self._pending: Update | None = None
        self._saving: Saving | None = None
        self._begins_to_save = False
        self.reruns: set[int] = set()
        self.notes: list[str] = []
        self.logs_notes = True
        self.spans: list[Span] = []
        self._spans_origin = 0.0
        self._run = self.table()

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
            smoothing = self.policies.settings.label_smoothing_factor
            head_loss = cross_entropy(step.num_tokens, self.policies.loss_chunk, smoothing)
            step.head_losses = [head_loss] * len(micro_batches)
        else:
            step.head_losses = [
                custom(loss_fn, batch, self.policies.loss_chunk, metrics)
                for batch, metrics in zip(micro_batches, step.metrics, strict=True)
            ]
        end = next(i for i, op in enumerate(step.schedule.ops) if op.kind == "N")
        try:
            self._execute(step, range(end), record)
        except BaseException as error:
            self._give_up_saving()  # its units would be of two steps
            self._step = None  # with all that the step holds: what is called next may need the memory
            if update is not None and step.update is not None and step.update.begun:
                done, count = len(self.trainable) - len(step.update.left), len(self.trainable)
                error.add_note(
                    f"{done} of {count} units were updated already (update: eager): the weights are those "
                    "of no step. Load the last saved model, or use update: deferred"
                )
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
        norm = next(i for i, op in enumerate(ops) if op.kind == "N")
        try:
            self._execute(step, range(norm, len(ops)), record)
        except BaseException:
            if step.plan.update == "sync" and step.update is not None and step.update.begun:
                self._pending = step.update  # flush() makes the rest
            raise
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
        try:
            self._execute(step, range(len(ops)), False)
        except BaseException:
            self._give_up_saving()
            raise
        self._pending = None
        self._end_of_writes()
        self.lanes.disk.drain()

    def finish_saving(self) -> None:
        """Write at once what was to be written beside a step that has not come; wait for the disk."""
        if self._saving is not None and self._begins_to_save:
            self.save(self._saving, background=False)
        self.lanes.disk.drain()

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
            self._begins_to_save = False

    def measure_norm(self) -> float:
        """Global gradient norm of the last forward_backward, without an update."""
        assert self._step is not None
        return self.norm_of(self._step)

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
