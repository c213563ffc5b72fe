"""The engine: executes steps over a skeleton, a host store and device slots.

An exception may end a call between any two bytecodes. The progress of a step is therefore never noted beside
the work, where the note could be lost, but read off the work itself: weights by `Update.progress`,
`steps_done` by the last update that was decided on. Leftovers of a call are cleared before the next
(`come_back`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from horizon_lm.config import ModelSettings
from horizon_lm.config.data import IGNORED
from horizon_lm.distributed.agreement import agree
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.engine.agreed import of_data, of_model
from horizon_lm.engine.disk_lane import Saving
from horizon_lm.engine.ends import Rows
from horizon_lm.engine.head_gradient import adds_in_fp32
from horizon_lm.engine.lanes import Lanes, Span
from horizon_lm.engine.loss import (
    Asked,
    LossFunction,
    TokenLoss,
    cross_entropy,
    custom,
    shifted_targets,
)
from horizon_lm.engine.ops import Ops
from horizon_lm.engine.positions import Positions
from horizon_lm.engine.results import gather_results
from horizon_lm.engine.step import Schedule, Step, Update
from horizon_lm.machine.determinism import DeterministicKernels
from horizon_lm.memory.pinned import PinnedPool
from horizon_lm.memory.store import HostStore
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.model.attention import attention_restorer
from horizon_lm.model.capture import drop_captures
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer, UpdateSettings
from horizon_lm.schedule import Op, StepSpec, build, build_flush, build_save
from horizon_lm.schedule.world import digest
from horizon_lm.words import count


class Engine:
    """Executes training steps. lanes: executor of the ops.

    With several ranks every method that takes a step or reads weights is collective: all call it with the
    same arguments, micro-batches of all ranks included.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        store: HostStore,
        optimizer: Optimizer,
        lanes: Lanes,
        settings: ModelSettings,
        ranks: Ranks = ALONE,
    ) -> None:
        self.skeleton, self.store, self.ranks = skeleton, store, ranks
        device = self.device = store.device
        self.optimizer, self.lanes, self.settings = optimizer, lanes, settings
        alias = device.type == "cpu" and lanes.in_place
        self.ops = Ops(skeleton, store, optimizer, settings, alias, ranks)
        self.pinned = PinnedPool(device)  # for everything but weights that a step copies to the device
        self.trainable = self.ops.policies.trainable
        self._schedules: dict[tuple[StepSpec, bool], Schedule] = {}
        self._step: Step | None = None  # the step whose complete gradients the store holds
        self._steps_before = 0  # steps done before `_update`
        self._update: Update | None = None  # the last one decided on, or running (eager)
        self._is_mixed = False
        self._has_met = False  # whether ranks have compared their models
        self._is_training: bool | None = True  # mode of the model's modules; None if unknown
        self._begins_to_save = False
        self._has_run_writes = False
        self._inside = threading.local()
        self.spans: list[Span] = []
        self._spans_origin = 0.0
        self._is_at_work = False
        self._kernels = DeterministicKernels.on(device, settings.deterministic)
        adds_in_fp32(device, skeleton.dtype)  # now: in a step it would wait for the device
        self._restorers = (
            skeleton.restorer(),
            attention_restorer(),
            partial(drop_captures, skeleton),
            self._kernels.leave,
        )

    def spec(self, micro_batches: int, *, evaluate: bool = False, save: bool = False) -> StepSpec:
        """The spec of a step of N micro-batches of this rank. save: a checkpoint is written while it runs."""
        saved = frozenset(u for u, unit in enumerate(self.store.units) if unit.numel * save)
        return self.ops.policies.step_spec(micro_batches, evaluate=evaluate, saved=saved)

    def schedule(self, spec: StepSpec, *, pending: bool = False) -> Schedule:
        """The schedule of a step, built once. pending: it starts with the updates of the step before."""
        if (spec, pending) not in self._schedules:
            ops = build(spec, step=1, pending=spec.trainable if pending else ())
            made = Schedule.of(ops)
            self._schedules[spec, pending] = made._replace(digest=digest(ops) if spec.world > 1 else "")
        return self._schedules[spec, pending]

    def agree_on(self, update: UpdateSettings) -> None:
        """Raise ConfigError on all ranks unless they are about to make the same update. Collective."""
        self._agree("update", update=update)

    def _agree(self, call: str, step: Step | None = None, update: UpdateSettings | None = None) -> None:
        """Raise the same ConfigError on all ranks unless they make the same call on the same data."""
        if self.ranks.world == 1:
            return
        if not self._has_met:
            products = {"sums of products in fp32": adds_in_fp32(self.device, self.store.dtype)}
            agree(self.ranks, of_model(self.store.units, self.settings) | products)
            # `auto` depends on the memory of the device.
            self.ops.set_loss_chunk(min(self.ranks.exchange(self.ops.policies.loss_chunk)))
            self._has_met = True
        values: dict[str, Any] = {"call": f"{call} after {count(self.steps_done, 'step')}"}
        values["update"] = update and vars(update)
        if step is not None:
            values |= {"micro-batches": step.data, "schedule": step.schedule.digest}
        agree(self.ranks, values)

    # State between calls

    @property
    def steps_done(self) -> int:
        """Steps whose updates are done, or will be before anyone reads the weights."""
        update = self._update
        return self._steps_before if update is None else update.settings.step - (not update.counts)

    @property
    def has_pending(self) -> bool:
        """Whether updates that were decided on are still to run (`update: deferred`, or after an error)."""
        return self._update is not None and not self._update.eager and bool(self._update.left)

    @property
    def gradients(self) -> Step | None:
        """The step whose gradients are in the store and not applied yet."""
        step = self._step
        usable = step is not None and step.number == self.steps_done and not step.ends_itself
        return step if usable else None

    @property
    def holds_gradients(self) -> bool:
        """Whether the store holds the gradients of one step, applied or not."""
        return self._step is not None

    @property
    def last_step(self) -> Step | None:
        """That step."""
        return self._step

    def holds_gradients_of(self, step: Step) -> bool:
        return self._step is step

    @property
    def torn(self) -> str | None:
        """Why the weights belong to no single step, in words; None normally."""
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

    def is_being_replaced(self) -> None:
        """Mark the store as being overwritten: until `replaced` its content belongs to no step."""
        self.flush()
        self.replaced(self.steps_done)
        self._is_mixed = True

    def replaced(self, steps_done: int) -> None:
        """Take the store's content as the state after N steps; drop updates and gradients."""
        self._steps_before, self._update, self._step, self._is_mixed = steps_done, None, None, False

    def come_back(self) -> None:
        """Clean up after an interrupted call: stop its ops, restore modules, drop a half-written checkpoint.

        Called before each call.
        """
        self.lanes.join()
        if self._is_at_work:
            for restore in self._restorers:
                restore()
            self._is_at_work = False
        if self._has_run_writes:
            self._give_up_saving()

    # Steps

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        update: UpdateSettings | None = None,
        loss_fn: LossFunction | None = None,
        record: bool = False,
        ends_itself: bool = False,
    ) -> Step:
        """Run forward and backward, with the deferred updates of the step before, or with this step's own
        eager updates (`update`). Gradients stay in the store unless updates are eager.

        Continues from a torn state as it is. ends_itself: see `Step`.
        """
        if self.torn:
            self.replaced(self.steps_done)
        if self.has_pending and (self._is_cut_short or self.settings.update_mode != "deferred"):
            self.flush()
        self._step = None  # with all that it holds: the memory may be needed
        self._set_mode(training=True)
        positions = Positions.of(len(micro_batches), self.ranks)
        spec = self.spec(len(positions), save=self._begins_to_save)
        step = self._begin(spec, micro_batches, self.steps_done, pending=self.has_pending)
        with_own = "a loss function" if loss_fn is not None else "cross-entropy"
        self._agree(f"forward_backward with {with_own}", step, update)
        step.ends_itself = ends_itself
        if update is not None:
            self._update = step.update = Update.of(self.trainable, update, eager=True)
        elif self.has_pending:
            step.update = self._update
        self._prepare_losses(step, loss_fn)
        self._has_run_writes = self._begins_to_save
        try:
            self._execute(step, range(step.schedule.norm), record)
        except BaseException as error:
            self._give_up_saving()  # its units would be of two steps
            if self.torn:
                error.add_note(
                    f"{self.torn}: the weights are those of no step. Load the last saved model, or use "
                    "update: deferred"
                )
            raise
        self._end_of_writes()
        self._gather(step)
        self._step = step
        return step

    def _gather(self, step: Step) -> None:
        """Give each rank the results of all."""
        fallbacks = gather_results(step, self.ranks, self.ops.reruns)
        for unit, reason in fallbacks.items():  # policies are equal on all ranks
            self.ops.fall_back(unit, reason)

    def _begin(
        self, spec: StepSpec, micro_batches: Sequence[MicroBatch], number: int, *, pending: bool
    ) -> Step:
        # No copy is in flight: a run of the lanes ends after its copies.
        self.pinned.give_back()
        self.ops.boundary_slots.begin_step()
        positions = Positions.of(len(micro_batches), self.ranks)
        all_targets = [shifted_targets(batch["labels"]) for batch in micro_batches]
        # Copies from pageable memory would block the compute lane.
        take = self.pinned.take
        mine = [micro_batches[g] for g in positions.numbers]
        step = Step(
            spec,
            self.schedule(spec, pending=pending),
            [{n: take(v) for n, v in batch.items() if v is not None} for batch in mine],
            [take(all_targets[g]) for g in positions.numbers],
            positions,
            [targets.numel() for targets in all_targets],
            sum(int((targets != IGNORED).sum()) for targets in all_targets),
            number=number,
            rng_base=self.settings.seed * 1_000_003 + number,
            data=of_data(micro_batches) if self.ranks.world > 1 else [],
        )
        if spec.lowest_backward == 0 and not spec.evaluate:
            ids = [self.skeleton.table_ids(batch["input_ids"]) for batch in micro_batches]
            step.rows = Rows.of(ids, self.skeleton, self.pinned, positions.numbers)
        return step

    def _prepare_losses(self, step: Step, loss_fn: LossFunction | None) -> None:
        step.device_metrics = [{} for _ in step.micro_batches]
        if loss_fn is None:
            smoothing = self.ops.policies.settings.label_smoothing_factor
            head_loss = cross_entropy(step.num_tokens, self.ops.policies.loss_chunk, smoothing)
            step.head_losses = [head_loss] * len(step.micro_batches)
        else:
            if isinstance(loss_fn, TokenLoss):
                step.router_weight = loss_fn.router_weight
            step.head_losses = [
                custom(loss_fn, batch, self.ops.policies.loss_chunk, metrics)
                for batch, metrics in zip(step.micro_batches, step.device_metrics, strict=True)
            ]

    def evaluate(
        self, micro_batches: Sequence[MicroBatch], asked: Asked, *, routers: bool = False, record: bool
    ) -> Step:
        """Run forward and loss only, without dropout; the step holds losses and, on this rank, values of the
        targets. routers: compute the routers' auxiliary losses too."""
        self.flush()
        positions = Positions.of(len(micro_batches), self.ranks)
        step = self._begin(self.spec(len(positions), evaluate=True), micro_batches, 0, pending=False)
        step.asked, step.wants_routers = asked, routers
        self._agree(f"evaluate of {sorted(asked.values)} at temperature {asked.temperature}", step)
        self._set_mode(training=False)
        try:
            self._execute(step, range(len(step.schedule.ops)), record)
        finally:
            self._set_mode(training=True)
        self._gather(step)
        return step

    def _set_mode(self, *, training: bool) -> None:
        """Set the model's mode; if that is interrupted, the next call sets it again."""
        if self._is_training is not training:
            self._is_training = None
            self.skeleton.model.train(training)
            self._is_training = training

    def update(self, step: Step, settings: UpdateSettings, *, record: bool = False) -> None:
        """Take the norm of the gradients of `step` in the store, then update, at once or during the next
        step. Taking the norm decides the update; `flush` completes it."""
        assert self.holds_gradients_of(step), "update() needs a forward_backward() before it"
        if step.spec.update != "eager":
            step.update = Update.of(self.trainable, settings)
        norm, end = step.schedule.norm, len(step.schedule.ops)
        self._execute(step, range(norm, norm + 1), record)
        self._update = step.update
        if norm + 1 < end:
            self._execute(step, range(norm + 1, end), record)

    def flush(self) -> None:
        """Run pending updates, so that the store holds what the last step decided."""
        update = self._update
        if update is None or not self.has_pending:
            return
        self._execute_alone(build_flush(self.spec(1), 0, update.left), update)

    def _execute_alone(self, ops: list[Op], update: Update | None, *, save: bool = False) -> None:
        """Execute these ops as a step of their own."""
        step = Step(self.spec(1, save=save), Schedule.of(ops), update=update)
        self._execute(step, range(len(ops)), record=False)

    @property
    def _is_cut_short(self) -> bool:
        return self._update is not None and self._update.has_begun and bool(self._update.left)

    # Checkpoints

    def save(self, saving: Saving, *, background: bool) -> None:
        """Write every unit as the last step's update leaves it: while the next steps run (`background`), or
        at once. Waits for an earlier checkpoint first."""
        self.lanes.disk.drain()
        self.lanes.disk.give_up = saving.abandon
        self.ops.updates.saving, self._begins_to_save = saving, True
        if background:
            return
        update = self._update if self.has_pending else None
        ops = build_save(self.spec(1, save=True), 1, update.left if update is not None else ())
        self._has_run_writes = True
        try:
            self._execute_alone(ops, update, save=True)
        except BaseException:
            self._give_up_saving()
            raise
        self._end_of_writes()
        self.lanes.disk.drain()

    def finish_saving(self) -> None:
        """Write now what was to be written during the next step; wait for the disk."""
        if self.ops.updates.saving is not None and self._begins_to_save:
            self.save(self.ops.updates.saving, background=False)
        self.lanes.disk.drain()

    def _give_up_saving(self) -> None:
        """Drop the checkpoint whose units a failed run was to write."""
        if self.ops.updates.saving is not None and self._begins_to_save:
            self.ops.updates.saving.abandon()
            self.lanes.disk.clear()
        self._end_of_writes()

    def _end_of_writes(self) -> None:
        """All units are queued: the disk lane completes the checkpoint after them."""
        if self.ops.updates.saving is not None and self._begins_to_save:
            self.lanes.disk.submit(frozenset(), self.ops.updates.saving.finish)
        self._begins_to_save = self._has_run_writes = False

    # Ops

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While open, the caller runs parts of the model between steps; what an interrupt leaves behind is
        cleared by the next call."""
        self._is_at_work = True
        try:
            with self._kernels:
                yield
        except BaseException as error:
            self._is_at_work = not isinstance(error, Exception)  # everything was restored meanwhile
            raise
        self._is_at_work = False

    def _execute(self, step: Step, indices: range, record: bool) -> None:
        schedule = step.schedule

        def execute(i: int) -> None:
            op = self._inside.op = schedule.ops[i]
            if self.ranks.world > 1:
                self.ranks.at(f"{op} of step {step.number + 1}")
            try:
                with self.pinned.in_use():
                    self.ops.functions[op.kind](step, op)
            except BaseException as error:
                # At once: others wait for this rank in a collective, and so may this rank's own device.
                self.ranks.publish_failure(error)
                raise
            finally:
                self._inside.op = None
            for buffer in schedule.ends[i]:
                if self.lanes.on_release is not None:
                    self.lanes.on_release(self.ops.tensors_of(step, buffer))
                step.memory.pop(buffer, None)

        self._is_at_work = True
        try:
            with self._kernels:
                self.lanes.run(schedule.ops, schedule.waits, indices, execute, record=record)
        except BaseException as error:
            self.ranks.publish_failure(error)  # of an interrupt between two ops
            if isinstance(error, Exception):  # everything was restored while it propagated
                self._is_at_work = False
            raise
        self._is_at_work = False
        if indices.start == 0:
            self.spans, self._spans_origin = [], self.lanes.origin
        later = self.lanes.origin - self._spans_origin  # an update's spans follow those of its gradients
        self.spans += [(op, start + later, end + later) for op, start, end in self.lanes.spans]
