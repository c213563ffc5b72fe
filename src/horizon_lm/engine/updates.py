"""Ops from a unit's first gradient to its updated weights: D, P, S, G, N, O, A, W.

A gradient accumulates in a slot. Between two rounds it stays there, or waits in host memory: parked (P) and
brought back (G), or added up there (S) of gradients of single micro-batches. Once complete it is downloaded
(D), which for a resident unit is a copy within the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from horizon_lm.engine.disk_lane import Saving
from horizon_lm.engine.gradient import UnitGradient, squares
from horizon_lm.engine.policies import Policies
from horizon_lm.engine.step import Step
from horizon_lm.memory.slots import GradientSlots, gradient_slot_numels
from horizon_lm.memory.store import HostStore
from horizon_lm.optim.gradients import add_gradient
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.schedule import Op


class Updates:
    """Functions of these ops, and the slots of gradients. saving: the checkpoint that W ops write."""

    def __init__(
        self, store: HostStore, optimizer: Optimizer, policies: Policies, device: torch.device, alias: bool
    ) -> None:
        self.store, self.optimizer, self.policies = store, optimizer, policies
        spec = policies.step_spec(policies.rounds)
        self.slots = GradientSlots(store, gradient_slot_numels(store.units, spec), device, alias)
        self.saving: Saving | None = None
        self.functions: dict[str, Callable[[Step, Op], None]] = {
            "D": self._download,
            "P": self._park,
            "S": self._add,
            "G": self._get_back,
            "N": self._norm,
            "O": self._optimize,
            "A": self._optimize,
            "W": self._write,
        }

    # Gradients that accumulate

    def gradient(self, step: Step, op: Op) -> UnitGradient | None:
        """The gradient to which an L or B adds; None for a frozen unit."""
        if op.grad_slot < 0:
            return None
        if op.first:
            step.gradients[op.unit] = self.new_gradient(step, op.unit, op.grad_slot, op.micro_batch)
        return step.gradients[op.unit]

    def new_gradient(self, step: Step, unit: int, grad_slot: int, micro_batch: int = -1) -> UnitGradient:
        """micro_batch: the first that it receives; -1 is the sum of all."""
        spec, token_counts = step.spec, step.token_counts
        layout, store = self.store.units[unit], self.store.dtype
        if micro_batch >= 0 and self._is_added_on_host(step, unit) and micro_batch < spec.micro_batches - 1:
            # The narrowest dtype that holds the gradient of one micro-batch.
            is_wide = any(p.compute_dtype != store for p in layout.trainable)
            return self._accumulating(
                step, unit, grad_slot, torch.float32 if is_wide else store, in_pairs=False
            )
        dtype = self.policies.gradient_dtype(unit, token_counts, store)
        in_pairs = self.slots.alias and self.policies.adds_gradients(unit, token_counts)
        return self._accumulating(step, unit, grad_slot, dtype, in_pairs=in_pairs)

    def _accumulating(
        self, step: Step, unit: int, grad_slot: int, dtype: torch.dtype, *, in_pairs: bool
    ) -> UnitGradient:
        spec, layout = step.spec, self.store.units[unit]
        at_home = self.slots.is_alias(dtype) and not spec.accumulates_in_slot(unit)
        if at_home:
            run = self.store.gradient_run(unit, spec.slab(unit))
        else:
            run = self.slots.run(grad_slot, unit, dtype)
        return UnitGradient(layout, run, at_home=at_home, in_pairs=in_pairs)

    def _is_added_on_host(self, step: Step, unit: int) -> bool:
        return step.spec.adds_on_host and unit in step.spec.host_sums

    def end_micro_batch(self, step: Step, op: Op) -> None:
        """After the last micro-batch of a round, add the gradient that waits for a second one."""
        gradient = step.gradients[op.unit]
        if op.kind == "L" and op.micro_batch == step.spec.micro_batches - 1:
            gradient.complete()  # a tied table's gradient waits here for its rows
        if step.spec.ends_round(op.micro_batch):
            gradient.settle()

    # Between rounds

    def _park(self, step: Step, op: Op) -> None:
        """Copy an unfinished gradient to host memory: as a sum, or for the host to add it to the sum."""
        gradient = step.gradients[op.unit]
        if op.sum_slab < 0:
            self.store.sum_run(op.unit).copy_(gradient.run, non_blocking=True)
            return
        self._in_slab(op.sum_slab, gradient).copy_(gradient.run, non_blocking=True)
        step.parked[op.sum_slab] = step.gradients.pop(op.unit)

    def _add(self, step: Step, op: Op) -> None:
        """Add the gradient of one micro-batch to the sum, as `UnitGradient.add` does: only parameters that
        received something."""
        layout, given = self.store.units[op.unit], step.parked.pop(op.sum_slab)
        given.run = self._in_slab(op.sum_slab, given)
        if op.first:
            step.host_sums[op.unit] = UnitGradient(layout, self.store.sum_run(op.unit))
        total = step.host_sums[op.unit]
        for parameter in layout.trainable:
            name = parameter.name
            if name in given.written:
                view, value = (layout.trainable_view(g.run, parameter) for g in (total, given))
                add_gradient(view, value, begins=name not in total.written)
                total.written.add(name)

    def _in_slab(self, slab: int, gradient: UnitGradient) -> torch.Tensor:
        return self.store.sum_slab(slab).view(gradient.run.dtype)[: gradient.run.numel()]

    def _get_back(self, step: Step, op: Op) -> None:
        """Copy an unfinished gradient back into a slot, which may be another than before."""
        if op.unit in step.host_sums:
            written = step.host_sums.pop(op.unit).written
            step.gradients[op.unit] = self.new_gradient(step, op.unit, op.grad_slot)
            step.gradients[op.unit].written = written
        gradient = step.gradients[op.unit]
        if not gradient.at_home:
            gradient.run = self.slots.run(op.grad_slot, op.unit, gradient.run.dtype)
        gradient.run.copy_(self.store.sum_run(op.unit), non_blocking=True)

    # Complete gradients

    def _download(self, step: Step, op: Op) -> None:
        gradient = step.gradients.pop(op.unit)
        eager = step.spec.update == "eager"
        if eager and op.unit in step.spec.resident:
            step.square_norms[op.unit] = gradient.round(self.store.dtype)
            step.resident_gradients[op.unit] = gradient.run
            return
        target = self.store.gradient_run(op.unit, op.slab)
        found = gradient.download(target, measure=eager)
        if found is not None:
            step.square_norms[op.unit] = found

    def norm_of(self, step: Step) -> float:
        """The global gradient norm of a step whose gradients are complete."""
        if step.spec.update != "eager":
            for unit in self.policies.trainable:
                self._measure(step, unit)
        return step.norm()

    def _measure(self, step: Step, unit: int) -> None:
        """Take the norm of a gradient that accumulated in host memory, so was never downloaded."""
        if unit not in step.square_norms:
            step.square_norms[unit] = squares(self.store.run("grads", unit))

    def _norm(self, step: Step, op: Op) -> None:
        norm = self.norm_of(step)
        assert step.update is not None
        limit = step.update.settings.max_grad_norm
        step.update.grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # as clip_grad_norm_

    def _optimize(self, step: Step, op: Op) -> None:
        update = step.update
        assert update is not None
        eager = step.spec.update == "eager"
        if eager and not self._may_update(step, op):
            return
        progress = update.progress[op.unit]
        if eager and op.unit in step.spec.resident:
            grads = step.resident_gradients[op.unit]
        else:
            grads = self.store.gradient_run(op.unit, op.slab)
        self.optimizer.update_unit(self.store, op.unit, grads, update.settings, update.grad_scale, progress)

    def _may_update(self, step: Step, op: Op) -> bool:
        """Whether an eager update may run: a gradient that is not finite ends those of the step."""
        update = step.update
        assert update is not None
        if update.stopped_at is None and not step.is_finite(op.unit):
            update.stopped_at = op.unit
        return update.stopped_at is None

    def _write(self, step: Step, op: Op) -> None:
        assert self.saving is not None
        self.saving.write_unit(op.unit)
