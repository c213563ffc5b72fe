"""What each op kind does: one function each, which is handed the op and takes its slots and buffers by
the numbers that the schedule gave it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.engine import activations, compute, noise
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.lanes import reads_on_this_lane
from horizon_lm.engine.loss import log_probabilities
from horizon_lm.engine.policies import Policies
from horizon_lm.engine.saving import Saving
from horizon_lm.engine.step import Step, Update
from horizon_lm.engine.transfer import square_norm
from horizon_lm.memory.slots import BoundarySlots, GradientSlots, UnitWeights, WeightSlots
from horizon_lm.memory.store import HostStore
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.schedule import Buffer, Op
from horizon_lm.schedule.step_plan import KEEP

_log = logging.getLogger(__name__)


class OpFunctions:
    """The functions of the ops, over what the engine has made."""

    skeleton: Skeleton
    store: HostStore
    optimizer: Optimizer
    device: torch.device
    settings: ModelSettings
    policies: Policies
    trainable: frozenset[int]
    weight_slots: WeightSlots
    gradient_slots: GradientSlots
    boundary_slots: BoundarySlots
    _embedding: nn.Embedding
    _poison: bool
    _saving: Saving | None
    reruns: set[int]
    notes: list[str]
    logs_notes: bool

    def table(self) -> dict[str, Callable[[Step, Op], None]]:
        """Op kind to function."""
        return {
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
        with self._draws(step, op)():
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
            reruns=op.unit in self.reruns,
        )
        if isinstance(done.graph, activations.Rerun):
            self._fall_back(op.unit, done.graph.reason)
        if done.graph is not None:
            step.memory[Buffer("graph", op.unit, op.micro_batch)] = done.graph
        call.routers.append(done.routers)
        return done.output

    def _fall_back(self, unit: int, reason: str) -> None:
        """Recompute the layer from the next step on. The cause lies in the layer's own code, so it is for
        good; where it changes anything it is said once, in `notes`."""
        if unit in self.reruns:
            return
        if unit in self.policies.kept:
            self.tell(
                f"{self.store.units[unit].name} is recomputed from now on because {reason}, where streamed "
                "weights cannot be replaced; costs about one more forward pass of that layer a step"
            )
        self.policies = replace(self.policies, kept=self.policies.kept - {unit})
        self.reruns.add(unit)

    def tell(self, note: str) -> None:
        """Note a change of what the settings asked for; logged unless somebody takes the notes."""
        self.notes.append(note)
        if self.logs_notes:
            _log.warning(note)

    def _spill(self, step: Step, op: Op) -> None:
        value = step.tensor("input", op.unit, op.micro_batch)
        reads_on_this_lane(value)
        home = self.boundary_slots.spill(op.unit, op.micro_batch, value)
        step.memory[Buffer("boundary", op.unit, op.micro_batch)] = home

    def _restore(self, step: Step, op: Op) -> None:
        self.boundary_slots.restore(op.boundary_slot, step.tensor("boundary", op.unit, op.micro_batch))

    def _recompute(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        with self._draws(step, op)():
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
            self._draws(step, op),
            num_tokens=step.num_tokens,
        )
        step.losses[m] = loss
        step.memory[Buffer("input_grad", -1, m)] = gradient

    def _evaluate(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        step.call(m)
        with self._draws(step, op)(), self.skeleton.bound(op.unit, self._weights(op), grad=False):
            found = log_probabilities(
                self.skeleton, step.tensor("input", op.unit, m), step.targets[m], self.policies.loss_chunk
            )
        step.log_probs[m] = found[:, :-1]
        step.losses[m] = -found.double().sum() / max(1, step.num_tokens)

    def _backward(self, step: Step, op: Op) -> None:
        m = op.micro_batch
        gradient = step.tensor("input_grad", -1, m)
        with self._draws(step, op)():
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
        norm = self.norm_of(step)
        assert step.update is not None
        limit = step.update.settings.max_grad_norm
        step.update.grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # as clip_grad_norm_

    def _optimize(self, step: Step, op: Op) -> None:
        update = step.update
        assert update is not None
        if step.plan.update == "eager" and not self._may_update(step, update, op.unit):
            return
        progress = update.progress[op.unit]
        grads = self.store.gradient_run(op.unit, op.slab)
        self.optimizer.update_unit(self.store, op.unit, grads, update.settings, update.grad_scale, progress)

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
            finite = math.isfinite(square) and (update.has_begun or math.isfinite(step.loss))
            if not finite:
                update.stopped_at = unit
        return update.stopped_at is None

    def norm_of(self, step: Step) -> float:
        """The global gradient norm of a step whose gradients are in host memory."""
        if step.plan.update != "eager":
            for unit in self.trainable:
                self._measure(step, unit)
        return step.norm()

    def _measure(self, step: Step, unit: int) -> None:
        """Take the norm of a gradient that was at home from the start, and so was not downloaded."""
        if unit not in step.square_norms:
            step.square_norms[unit] = square_norm(self.store.run("grads", unit))

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

    def _draws(self, step: Step, op: Op) -> noise.Draws:
        return partial(noise.random_state, self.device, step.rng_base, op.unit, op.micro_batch)
