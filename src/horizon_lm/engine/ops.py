"""Implementations of each op kind.

An op's function takes its slots and buffers by the numbers that the schedule gave it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from horizon_lm.config import ModelSettings
from horizon_lm.config.data import IGNORED
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.engine import ends
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.lanes import reads_on_this_lane
from horizon_lm.engine.layers import Layer, Rerun
from horizon_lm.engine.loss import token_values
from horizon_lm.engine.policies import Policies
from horizon_lm.engine.sharded import ShardedUpdates
from horizon_lm.engine.step import Step
from horizon_lm.engine.updates import Updates
from horizon_lm.machine.device import memory_bytes
from horizon_lm.memory.boundaries import BoundarySlots
from horizon_lm.memory.layout import Parameter
from horizon_lm.memory.slots import (
    GradientSlots,
    UnitWeights,
    WeightSlots,
    shard_numels,
    weight_slot_numels,
)
from horizon_lm.memory.staging import StagingSlots, staging_slot_bytes
from horizon_lm.memory.store import HostStore
from horizon_lm.model.capture import run_router_loss
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.model.twins import host_twins
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.picture_batches import is_flat
from horizon_lm.schedule import Buffer, Op
from horizon_lm.schedule.step_spec import EXACT, KEEP

_log = logging.getLogger(__name__)
Function = Callable[[Step, Op], None]
_HOST_REGIONS = {"slab": "grad_slabs", "sum": "sums", "sum_slab": "sum_slabs"}  # of transient buffers


def _unless_empty(function: Function) -> Function:
    """The op's function, except for positions without a micro-batch."""

    def run(step: Step, op: Op) -> None:
        if not step.positions.is_empty(op.micro_batch):
            function(step, op)

    return run


class Ops:
    """Functions of the ops, and the slots they work on.

    alias: slots alias the store. reruns: layers whose graphs cannot be kept, and why. functions: op kind to
    function.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        store: HostStore,
        optimizer: Optimizer,
        settings: ModelSettings,
        alias: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.skeleton, self.store, self.ranks = skeleton, store, ranks
        device = self.device = store.device
        self.policies = Policies.of(settings, skeleton, memory_bytes(device), ranks.world)
        spec = self.policies.step_spec(1)
        numels, shards = weight_slot_numels(store.units, spec, alias=alias), shard_numels(store.units, spec)
        self.weight_slots = WeightSlots(store, numels, device, alias, shards)
        staged = staging_slot_bytes(store.units, spec, store.dtype, store.spec.packing)
        self.staging_slots = StagingSlots(store, staged, device, alias)
        if not spec.is_shared:
            self.updates = Updates(store, optimizer, self.policies, device, alias)
        else:
            table = self._table if spec.sums_rows else None
            self.updates = ShardedUpdates(store, optimizer, self.policies, device, ranks, table)
        self.gradient_slots = self.updates.slots
        self.boundary_slots = BoundarySlots(settings.boundary_slots, device, alias)
        self.reruns: dict[int, str] = {}
        self.notes: list[str] = []
        self.remarks: list[str] = []
        self.logs_notes = True
        self.functions: dict[str, Function] = {
            "U": self._upload,
            "Q": self._unpack,
            "J": self._join,
            "F": _unless_empty(self._forward),
            "X": _unless_empty(self._spill),
            "L": self._loss,
            "E": _unless_empty(self._evaluate),
            "R": _unless_empty(self._restore),
            "C": _unless_empty(self._recompute),
            "B": self._backward,
            **self.updates.functions,
        }

    def set_loss_chunk(self, tokens: int) -> None:
        """Use another chunk than what the settings resolved to on this rank."""
        self.policies = replace(self.policies, loss_chunk=tokens)
        self.updates.policies = self.policies

    @property
    def slot_bytes(self) -> dict[str, int]:
        """Device bytes of slots for weights and gradients; of staging slots if weights are packed, and in
        shared steps of buffers for shares."""
        found = {"weight_slots": self.weight_slots.num_bytes, "gradient_slots": self.gradient_slots.num_bytes}
        if self.store.spec.packing:
            found["staging_slots"] = self.staging_slots.num_bytes
        if isinstance(self.updates, ShardedUpdates):
            found |= {
                "weight_shards": self.weight_slots.shard_bytes,
                "gradient_shards": self.updates.shards.num_bytes,
            }
        return found

    def _upload(self, step: Step, op: Op) -> None:
        if op.staging >= 0:
            self.staging_slots.upload(op.staging, op.unit)
        else:
            self.weight_slots.upload(op.slot if op.shard < 0 else op.shard, op.unit)

    def _unpack(self, step: Step, op: Op) -> None:
        self.staging_slots.unpack(op.staging, op.unit, self.weight_slots.buffer(op.slot))

    def _join(self, step: Step, op: Op) -> None:
        self.weight_slots.join(op.slot, op.unit, self.ranks)

    def _forward(self, step: Step, op: Op) -> None:
        if op.unit == 0:
            output = self._forward_prologue(step, op)
        else:
            with step.draws(op, self.device)():
                output = self._forward_layer(step, op)
        step.memory[Buffer("input", op.unit + 1, op.micro_batch)] = output

    def _forward_prologue(self, step: Step, op: Op) -> torch.Tensor:
        m = op.micro_batch
        unit, parameter = self._table
        table = self._weights_of(unit, op.table).view(self.store.units[unit], parameter)
        with torch.no_grad(), host_twins(self.device):
            inputs = self._inputs(step, m)
            if step.rows is not None and m == 0:  # of all micro-batches: another unit may replace the table
                step.memory[Buffer("rows")] = table.index_select(0, self._on_device(step.rows.numbers))
            embeds = ends.look_up(self.skeleton, table, self.skeleton.table_ids(inputs["input_ids"]))
            with step.draws(op, self.device)():
                output, call = ends.forward_prologue(self.skeleton, self._weights(op), embeds, inputs)
        step.memory[Buffer("call", -1, m)] = call
        return output

    def _forward_layer(self, step: Step, op: Op) -> torch.Tensor:
        layer, hidden = self._layer(step, op), step.tensor("input", op.unit, op.micro_batch)
        grad = not step.spec.evaluate and op.unit >= step.spec.lowest_backward
        done = layer.forward(hidden, policy=op.policy, grad=grad, reruns=op.unit in self.reruns)
        if isinstance(done.graph, Rerun) and done.graph.reason is not None:
            self.fall_back(op.unit, done.graph.reason)
        if done.graph is not None:
            step.memory[Buffer("graph", op.unit, op.micro_batch)] = done.graph
        layer.call.routers.append(done.routers)
        return done.output

    def fall_back(self, unit: int, reason: str) -> None:
        """Recompute the layer from the next step on, permanently: the cause lies in the layer's own code.
        Noted once, and only if it changes anything."""
        if unit in self.reruns:
            return
        kept, products, attention = self.policies.kept, self.policies.products, self.policies.attention
        if unit in kept | products | attention:
            self.tell(
                f"{self.store.units[unit].name} is recomputed from now on because {reason}, where streamed "
                "weights cannot be replaced; costs about one more forward pass of that layer a step"
            )
        self.policies = replace(
            self.policies, kept=kept - {unit}, products=products - {unit}, attention=attention - {unit}
        )
        self.reruns[unit] = reason

    def tell(self, note: str) -> None:
        """Note a deviation from the settings; logged unless `HostModel.take_notes` collects notes."""
        self.notes.append(note)
        if self.logs_notes:
            _log.warning(note)

    def remark(self, text: str) -> None:
        """Note a fact about the run, as `tell` does for deviations from the settings."""
        self.remarks.append(text)
        if self.logs_notes:
            _log.info(text)

    def _spill(self, step: Step, op: Op) -> None:
        value = step.tensor("input", op.unit, op.micro_batch)
        reads_on_this_lane(value)
        self.boundary_slots.begin_round(op.micro_batch // step.spec.round_size)
        host = self.boundary_slots.spill(op.unit, op.micro_batch, value)
        step.memory[Buffer("boundary", op.unit, op.micro_batch)] = host

    def _restore(self, step: Step, op: Op) -> None:
        self.boundary_slots.restore(op.boundary_slot, step.tensor("boundary", op.unit, op.micro_batch))

    def _recompute(self, step: Step, op: Op) -> None:
        with step.draws(op, self.device)():
            done = self._layer(step, op).forward(
                self._stored_input(step, op), policy=KEEP, grad=True, in_place=True
            )
        assert done.graph is not None
        step.memory[Buffer("graph", op.unit, op.micro_batch)] = done.graph
        step.memory[Buffer("input", op.unit + 1, op.micro_batch)] = done.output

    def _loss(self, step: Step, op: Op) -> None:
        gradient = self.updates.gradient(step, op)
        if not step.positions.is_empty(op.micro_batch):
            self._loss_of(step, op, gradient)
        if gradient is not None:
            self.updates.end_micro_batch(step, op)

    def _loss_of(self, step: Step, op: Op, gradient: UnitGradient | None) -> None:
        m, skeleton, call = op.micro_batch, self.skeleton, step.call(op.micro_batch)
        hidden, targets = step.tensor("input", op.unit, m), step.targets[m]
        draws = step.draws(op, self.device)
        with (
            torch.enable_grad(),
            ends.bound_for_backward(skeleton, op.unit, self._weights(op), gradient),
        ):
            loss, hidden_gradient = step.head_losses[m](skeleton, hidden, targets, draws)
            if skeleton.has_router_loss:
                weight = step.router_weight
                if weight is None:
                    weight = int((targets != IGNORED).sum()) / step.num_tokens
                with host_twins(self.device):
                    call.inputs = self._inputs(step, m)  # copied again, for their twins
                    found = ends.router_loss_and_backward(skeleton, call, hidden, weight, draws)
                loss += found * weight
                step.router_losses[m] = found
        step.losses[m] = loss
        step.memory[Buffer("input_grad", -1, m)] = hidden_gradient

    def _evaluate(self, step: Step, op: Op) -> None:
        m, call = op.micro_batch, step.call(op.micro_batch)
        hidden, targets = step.tensor("input", op.unit, m), step.targets[m]
        with (
            step.draws(op, self.device)(),
            self.skeleton.bound(op.unit, self._weights(op), grad=False),
        ):
            found = token_values(self.skeleton, hidden, targets, self.policies.loss_chunk, step.asked)
            if step.wants_routers and self.skeleton.has_router_loss:
                with torch.no_grad(), host_twins(self.device):
                    call.inputs = self._inputs(step, m)  # copied again, for their twins
                    step.router_losses[m] = run_router_loss(self.skeleton, call, call.routers, hidden)
        step.values[m] = found
        # Padded, since the order of a sum depends on the strides.
        step.losses[m] = -F.pad(found.log_probs, (0, 1)).double().sum() / max(1, step.num_tokens)

    def _backward(self, step: Step, op: Op) -> None:
        gradient, is_empty = self.updates.gradient(step, op), step.positions.is_empty(op.micro_batch)
        if op.unit == 0:
            rows = None if is_empty else self._backward_prologue(step, op, gradient)
            if step.spec.sums_rows:
                self._sum_rows(step, op, rows)
        elif not is_empty:
            self._backward_layer(step, op, gradient)
        if gradient is not None:
            self.updates.end_micro_batch(step, op)

    def _backward_layer(self, step: Step, op: Op, gradient: UnitGradient | None) -> None:
        m = op.micro_batch
        with step.draws(op, self.device)():
            graph, hidden = step.graph(op.unit, m), self._stored_input(step, op)
            step.memory[Buffer("input_grad", -1, m)] = self._layer(step, op).backward(
                graph, hidden, step.tensor("input_grad", -1, m), gradient
            )

    def _backward_prologue(self, step: Step, op: Op, mine: UnitGradient | None) -> torch.Tensor | None:
        """Run the prologue backward; return the gradient of the rows [r, width], None for a frozen table or
        one that got nothing."""
        m, output_gradient = op.micro_batch, step.tensor("input_grad", -1, op.micro_batch)
        assert step.rows is not None
        leaf = step.tensor("rows", -1, -1).detach().requires_grad_(step.spec.sums_rows)
        with torch.enable_grad():
            embeds = ends.look_up(self.skeleton, leaf, self._on_device(step.rows.places[m]))
        with host_twins(self.device), step.draws(op, self.device)():
            call = replace(step.call(m), inputs=self._inputs(step, m))  # copied again, for their twins
            ends.backward_prologue(self.skeleton, self._weights(op), embeds, call, output_gradient, mine)
        return leaf.grad

    def _sum_rows(self, step: Step, op: Op, found: torch.Tensor | None) -> None:
        """Add the gradient of the rows to that of earlier micro-batches, unless it goes to other ranks first.
        found: [r, width]; None: zeros."""
        assert step.rows is not None
        buffer, adds = Buffer("row_grads"), step.positions.total > 1 and step.spec.reduction != EXACT
        if found is None:
            width = self.skeleton.embedding.embedding_dim
            shape = len(step.rows.numbers), width
            found = torch.zeros(shape, dtype=self.store.dtype, device=self.device)
        if adds and buffer in step.memory:
            step.tensor("row_grads", -1, -1).add_(found)
        else:
            step.memory[buffer] = found.float() if adds else found
        if op.table_grad >= 0:
            self._add_rows(step, op)

    def _add_rows(self, step: Step, op: Op) -> None:
        """Add the summed gradients of the rows to the embedding table's gradient."""
        assert step.rows is not None
        unit, parameter = self._table
        total = step.tensor("row_grads", -1, -1)
        if step.rows.padding is not None:
            total[step.rows.padding].zero_()
        if unit not in step.gradients:  # a tied table's gradient holds the head's
            step.gradients[unit] = self.updates.new_gradient(step, unit, op.table_grad)
        numbers = self._on_device(step.rows.numbers)
        step.gradients[unit].add_rows(parameter, numbers, total, self.store.dtype)

    # Arguments of the ops

    def _layer(self, step: Step, op: Op) -> Layer:
        return Layer(self.skeleton, op.unit - 1, self._weights(op), step.call(op.micro_batch))

    def _weights(self, op: Op) -> UnitWeights | None:
        has_weights = op.slot >= 0 or self.store.is_resident(op.unit)
        return self._weights_of(op.unit, op.slot) if has_weights else None

    def _weights_of(self, unit: int, slot: int) -> UnitWeights:
        """Where a unit's weights are: in a slot, at a resident unit's home, or a split unit's in both."""
        return self.weight_slots.unit(slot, unit)

    def _stored_input(self, step: Step, op: Op) -> torch.Tensor:
        if op.boundary_slot >= 0:
            return self.boundary_slots.held(op.boundary_slot)
        return step.tensor("input", op.unit, op.micro_batch)

    @property
    def _table(self) -> tuple[int, Parameter]:
        """The unit that owns the embedding table, and the table itself."""
        return self.store.locate(self.skeleton.anatomy.embedding)

    def _on_device(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.to(self.device, non_blocking=True)

    def _inputs(self, step: Step, m: int) -> dict[str, torch.Tensor]:
        names, inputs = {"input_ids", "attention_mask", "position_ids"}, self.skeleton.picture_inputs
        if inputs is not None:
            names |= {*inputs.per_token, *inputs.per_image}
        return {
            n: value.to(self.device, non_blocking=True)
            for n, value in step.micro_batches[m].items()
            if (n in names or (inputs is not None and is_flat(n))) and value is not None
        }

    def tensors_of(self, step: Step, buffer: Buffer) -> list[torch.Tensor]:
        """The tensors behind a transient buffer; none if it aliases the store."""
        slots: dict[str, WeightSlots | StagingSlots | GradientSlots | BoundarySlots] = {
            "slot": self.weight_slots,
            "staging": self.staging_slots,
            "grad_slot": self.gradient_slots,
            "boundary_slot": self.boundary_slots,
        }
        if buffer.region in slots:
            return slots[buffer.region].tensors(buffer.index)
        if buffer.region == "shard":
            return self.weight_slots.shard_tensors(buffer.index)
        if buffer.region == "grad_shard" and isinstance(self.updates, ShardedUpdates):
            return self.updates.shards.tensors(buffer.index)
        if buffer.region in _HOST_REGIONS:
            return [self.store.run(_HOST_REGIONS[buffer.region], buffer.index)]
        value = step.memory.get(buffer)
        return [value] if isinstance(value, torch.Tensor) else []
