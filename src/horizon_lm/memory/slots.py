"""Slots: device buffers for weights, gradients and stored inputs.

Slots live as long as the model. With `alias` (on the CPU) a weight slot is the store's own buffer, and a
gradient slot the store's gradient buffer if dtypes match: no copies. Resident units have no weight slot; that
of a split unit has its frozen part.

In shared steps (`StepSpec.is_shared`) a weight slot is filled with the shares of all ranks
(`WeightSlots.join`), of residents too, and a gradient slot is sent to the owners of its shares, which add up
in `GradientShards`. Only the rank's own share of the weights aliases the store then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.pinned import PinnedPool
from horizon_lm.memory.shards import Shard, UnitShard
from horizon_lm.memory.staging import staging_slot_bytes
from horizon_lm.memory.store import HostStore
from horizon_lm.schedule import StepSpec
from horizon_lm.schedule.step_spec import EXACT

_FP32 = torch.float32.itemsize


class UnitWeights(NamedTuple):
    """A unit's weights on the device: 1-D [numel], and the residuals of its wide parameters (int16
    [wide_numel]). more: further runs, each with its first element, if the weights lie in several places."""

    weights: torch.Tensor
    wide_residual: torch.Tensor
    more: tuple[tuple[int, torch.Tensor], ...] = ()

    @property
    def runs(self) -> list[torch.Tensor]:
        """All runs, in the order of their elements."""
        return [self.weights, *(run for _, run in self.more)]

    def view(self, layout: UnitLayout, parameter: Parameter) -> torch.Tensor:
        """View of a parameter, in the run that has it."""
        begin, found = 0, self.weights
        for first, run in self.more:
            if parameter.offset >= first:
                begin, found = first, run
        return layout.view(found, parameter, begin)


# Sizes. A ring of buffers serves prologue and layers, the outer one head and embedding table.


def weight_slot_numels(units: Sequence[UnitLayout], plan: StepSpec, *, alias: bool = False) -> list[int]:
    """Return the elements of each weight slot: ring slots fit prologue and layers, the outer one head and
    table. alias: all but packed parts are read in the store."""
    sizes = {
        u: units[u].wide_offset if u in plan.split else _shard(units[u], plan).slot_numel
        for u in plan.in_slots
    }
    if alias and not plan.is_shared:
        sizes = {u: units[u].packed_numel for u in plan.packed}
    return [_largest(sizes, range(plan.head))] * plan.slots + [_outer(sizes, plan)]


def shard_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each buffer for a rank's share of weights, one for each slot; none unless the
    step is shared."""
    if not plan.is_shared:
        return []
    shards = {u: _shard(units[u], plan) for u in plan.uploaded}
    sizes = {u: shard.weights_numel + shard.wide_numel for u, shard in shards.items()}
    return [_largest(sizes, range(plan.head))] * plan.slots + [_outer(sizes, plan)]


def gradient_slot_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the fp32 elements that each gradient slot has room for: ring, outer slot, and slots of units of
    their own. The ring fits the units without one; it is empty if there are none."""
    sizes = {u: _sent_bytes(units[u], u, plan) // _FP32 for u in plan.trainable}
    if plan.is_shared:
        sizes.pop(plan.head + 1, None)  # the embedding table's gradient is that of its rows
    outer = _outer(sizes, plan)
    own = [sizes.pop(unit) for unit in plan.own_grad_slots]
    return [_largest(sizes, range(plan.head))] * plan.grad_slots + [outer, *own]


def gradient_shard_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each fp32 buffer for a rank's share of a gradient, as `gradient_slot_numels`;
    none unless the step is shared."""
    if not plan.is_shared:
        return []
    sizes = {u: _shard(units[u], plan).trainable_share for u in plan.trainable}
    outer = _outer(sizes, plan)
    own = [sizes.pop(unit) for unit in plan.own_grad_shards]
    return [_largest(sizes, range(plan.head))] * plan.grad_slots + [outer, *own]


def _shard(unit: UnitLayout, plan: StepSpec) -> UnitShard:
    return UnitShard(unit, Shard(0, plan.world))


def _sent_bytes(layout: UnitLayout, unit: int, plan: StepSpec) -> int:
    """Bytes of a gradient while it accumulates: in fp32, unless its slot holds one micro-batch's
    (`exact`), which has the dtype of the unit's weights. The head's may be a sum over loss chunks."""
    numel = _shard(layout, plan).gathered_trainable_numel
    if plan.reduction != EXACT or unit == plan.head:
        return numel * _FP32
    return numel * max((p.compute_dtype.itemsize for p in layout.trainable), default=_FP32)


def _received_bytes(units: Sequence[UnitLayout], plan: StepSpec) -> int:
    """Bytes of the buffer for what other ranks send: gradients like this rank's own, or with `fast` one share
    of their sum, for units that add to an earlier one."""
    if plan.reduction == EXACT:
        return max(gradient_slot_numels(units, plan), default=0) * _FP32
    adding = [u for u in plan.trainable if u < plan.head] if plan.reduction and plan.rounds > 1 else []
    return max((_shard(units[u], plan).trainable_share for u in adding), default=0) * _FP32


def _largest(sizes: Mapping[int, int], units: Iterable[int]) -> int:
    return max((sizes.get(unit, 0) for unit in units), default=0)


def _outer(sizes: Mapping[int, int], plan: StepSpec) -> int:
    return _largest(sizes, (plan.head, plan.head + 1))


def slot_bytes(
    units: Sequence[UnitLayout],
    plan: StepSpec,
    dtype: torch.dtype,
    *,
    stages: bool = True,
    packing: str = "",
) -> dict[str, int]:
    """Predict the bytes of the weight and gradient slots, and of the buffers for shares and packed weights.
    stages: a rank's share of weights has a buffer on the device, as everywhere but on the CPU. packing: the
    format of packed parts."""
    found = {"weight_slots": sum(weight_slot_numels(units, plan)) * dtype.itemsize}
    if plan.packed:
        found["staging_slots"] = sum(staging_slot_bytes(units, plan, dtype, packing))
    if stages and plan.is_shared:
        found["weight_shards"] = sum(shard_numels(units, plan)) * dtype.itemsize
    return {**found, **gradient_slot_bytes(units, plan)}


def gradient_slot_bytes(
    units: Sequence[UnitLayout], plan: StepSpec, used: Collection[int] | None = None
) -> dict[str, int]:
    """Predict the bytes of the gradient slots, or of those `used`: `gradient_slots` are ring and outer slot,
    `gradient_sums` the slots of units of their own. Gradients accumulate in fp32.

    In a shared step, `gradient_shards` and `gradient_sums` are those of a rank's shares, and `exchange` is
    the buffer for what other ranks send.
    """
    sizes = [numel * _FP32 for numel in gradient_slot_numels(units, plan)]
    if used is not None:
        sizes = [size if slot in used else 0 for slot, size in enumerate(sizes)]
    own = plan.outer_grad_slot + 1
    found, sums = {"gradient_slots": sum(sizes[:own])}, sizes[own:]
    if plan.is_shared:
        sizes = [numel * _FP32 for numel in gradient_shard_numels(units, plan)]
        found["gradient_shards"], sums = sum(sizes[:own]), sizes[own:]
        found["exchange"] = _received_bytes(units, plan)
    return found | ({"gradient_sums": sum(sums)} if sums else {})


class WeightSlots:
    """Device buffers of `numels` elements each, and for shared steps of `shard_numels` for the rank's own
    shares, one for each slot. With `alias` these are in the store, and without them the slots are, but for
    packed parts."""

    def __init__(
        self,
        store: HostStore,
        numels: Sequence[int],
        device: torch.device,
        alias: bool,
        shard_numels: Sequence[int] = (),
    ) -> None:
        self._store, self._stages = store, not alias
        self._joins = bool(shard_numels)  # each slot is filled from shares
        self._alias = alias and not self._joins

        def buffers(numels: Sequence[int]) -> list[torch.Tensor]:
            return [torch.empty(n, dtype=store.dtype, device=device) for n in numels]

        self._buffers = [] if self._alias and not store.spec.packing else buffers(numels)
        self._shards = buffers(shard_numels) if self._stages and self._joins else []

    @property
    def num_bytes(self) -> int:
        """Device bytes of the slots; of those that alias the store, the packed parts'."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def shard_bytes(self) -> int:
        """Device bytes of the buffers for the rank's shares; 0 if they alias the store."""
        return sum(buffer.nbytes for buffer in self._shards)

    def upload(self, slot: int, unit: int) -> None:
        """Copy the unit's weights into the slot, asynchronously if the host memory is pinned; of a split unit
        the frozen part, of a resident one nothing. For a shared step, copy the rank's share into the buffer
        of that number."""
        store = self._store
        if store.is_split(unit) and not self._alias:
            frozen = store.run("frozen", unit)
            self._buffers[slot][: frozen.numel()].copy_(frozen, non_blocking=True)
        if self._alias or store.is_resident(unit) or (self._joins and not self._stages):
            return
        target = self._own(slot, unit) if self._joins else self.unit(slot, unit)
        target.weights.copy_(store.run("weights", unit), non_blocking=True)
        if target.wide_residual.numel():
            target.wide_residual.copy_(store.wide_residual(unit), non_blocking=True)

    def join(self, slot: int, unit: int, ranks: Ranks) -> None:
        """Gather the unit's weights in the slot, from the shares of all ranks. They call this together.

        The padding of each frozen part is overwritten by the trainable part, which comes second.
        """
        shard, buffer = self._store.shards[unit], self._buffers[slot]
        own = self._own(slot, unit)
        weights, wide_residual = own.weights, own.wide_residual
        place = buffer[: shard.gathered_weights_numel]
        _gather(ranks, weights, place, shard.frozen_share, shard.layout.trainable_offset)
        if wide_residual.numel():
            place = buffer[shard.gathered_weights_numel : shard.slot_numel].view(torch.int16)
            begin = shard.layout.trainable_offset - shard.layout.wide_offset
            _gather(ranks, wide_residual, place, shard.frozen_wide_share, begin)

    def unit(self, slot: int, unit: int) -> UnitWeights:
        """The unit's weights in a slot; unless it is filled from shares, a resident unit's in the store, and
        a split unit's in both."""
        store = self._store
        if self._alias or (store.is_resident(unit) and not self._joins):
            runs = self._streamed_runs(slot, unit) if slot >= 0 else []
            runs.append((store.shards[unit].begin, store.run("weights", unit)))
            first, *more = [(begin, run) for begin, run in runs if run.numel()] or runs
            return UnitWeights(first[1], store.wide_residual(unit), tuple(more))
        layout, buffer, begin = store.units[unit], self._buffers[slot], store.shards[unit]
        wide = torch.empty(0, dtype=torch.int16)
        if layout.wide_numel and store.has("residual"):
            wide = buffer[begin.gathered_weights_numel :][: layout.wide_numel].view(torch.int16)
        return UnitWeights(buffer[: layout.numel], wide)

    def _streamed_runs(self, slot: int, unit: int) -> list[tuple[int, torch.Tensor]]:
        """The parts of a unit that are not in its run of weights, each with its first element."""
        store, layout = self._store, self._store.units[unit]
        if not self._alias:
            return [(0, self._buffers[slot][: layout.wide_offset])] if store.is_split(unit) else []
        runs = [(0, self.buffer(slot)[: layout.packed_numel])] if layout.packed_numel else []
        return [*runs, (layout.packed_numel, store.run("frozen", unit))] if store.is_split(unit) else runs

    def buffer(self, slot: int) -> torch.Tensor:
        """The whole slot, 1-D; into it packed units are unpacked."""
        return self._buffers[slot]

    def _own(self, slot: int, unit: int) -> UnitWeights:
        """The rank's share of the unit's weights [weights_numel] and wide residuals, padding included."""
        weights, wide = self._store.run("weights", unit), self._store.wide_residual(unit)
        if not self._stages or self._store.is_resident(unit):
            return UnitWeights(weights, wide)
        buffer, begin = self._shards[slot], weights.numel()
        return UnitWeights(buffer[:begin], buffer[begin : begin + wide.numel()].view(torch.int16))

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """The slot's buffer; none if there is none."""
        return [self._buffers[slot]] if self._buffers else []

    def shard_tensors(self, shard: int) -> list[torch.Tensor]:
        """The buffer of a rank's share; none if it is in the store."""
        return [self._shards[shard]] if self._shards else []


def _gather(ranks: Ranks, own: torch.Tensor, place: torch.Tensor, first: int, begin: int) -> None:
    """Gather the two parts of `own` of all ranks in `place`: its first elements from 0 on, the others from
    `begin` on."""
    for part, start in ((own[:first], 0), (own[first:], begin)):
        if part.numel():
            ranks.all_gather(part, place[start : start + part.numel() * ranks.world])


class GradientSlots:
    """Device buffers of `numels` fp32 elements, each for one unit's gradient while it accumulates.

    A gradient that is written once has the store's dtype; one that is added to (several micro-batches or loss
    chunks) accumulates in fp32. With `alias`, a buffer is allocated only once a gradient cannot accumulate
    in the store (`Policies.cpu_slot_bytes` predicts them); otherwise immediately, rather than during the
    first step on another stream.
    """

    def __init__(self, store: HostStore, numels: Sequence[int], device: torch.device, alias: bool) -> None:
        self._store = store
        self.alias = alias
        self._device = device
        self._numels = numels
        self._buffers: list[torch.Tensor | None] = [None] * len(numels)
        for slot in range(0 if alias else len(numels)):
            self._buffer(slot)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def _buffer(self, grad_slot: int) -> torch.Tensor:
        found = self._buffers[grad_slot]
        if found is None:
            size = self._numels[grad_slot] * _FP32
            found = self._buffers[grad_slot] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return found

    def is_alias(self, dtype: torch.dtype) -> bool:
        """Whether a gradient of this dtype accumulates in the store itself."""
        return self.alias and dtype == self._store.dtype

    def run(self, grad_slot: int, unit: int, dtype: torch.dtype) -> torch.Tensor:
        """The slot as the unit's gradient buffer [trainable_numel] of `dtype`."""
        return self._buffer(grad_slot).view(dtype)[: self._store.units[unit].trainable_numel]

    def gathered(self, grad_slot: int, unit: int, dtype: torch.dtype) -> torch.Tensor:
        """The same with room for padding [world * trainable_share]: a share for each rank."""
        return self._buffer(grad_slot).view(dtype)[: self._store.shards[unit].gathered_trainable_numel]

    def tensors(self, grad_slot: int) -> list[torch.Tensor]:
        """The slot's buffer, as fp32; none if none was allocated."""
        found = self._buffers[grad_slot]
        return [] if found is None else [found.view(torch.float32)]


class GradientShards:
    """Device buffers for a rank's shares of summed gradients, in fp32, and one for what other ranks send,
    which only the network lane uses."""

    def __init__(self, store: HostStore, plan: StepSpec, device: torch.device) -> None:
        self._store, self._is_exact = store, plan.reduction == EXACT
        numels = gradient_shard_numels(store.units, plan)
        self._buffers = [torch.empty(n, dtype=torch.float32, device=device) for n in numels]
        size = _received_bytes(store.units, plan)
        self._received = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self._buffers, self._received))

    def run(self, grad_shard: int, unit: int) -> torch.Tensor:
        """The rank's share of the unit's gradient, fp32 [trainable_share]."""
        return self._buffers[grad_shard][: self._store.shards[unit].trainable_share]

    def received(self, unit: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for what other ranks send of the unit's gradient: with `exact` a share of each rank's
        [world * trainable_share], with `fast` one of their sum [trainable_share], for later rounds."""
        shard = self._store.shards[unit]
        numel = shard.gathered_trainable_numel if self._is_exact else shard.trainable_share
        return self._received.view(dtype)[:numel]

    def tensors(self, grad_shard: int) -> list[torch.Tensor]:
        return [self._buffers[grad_shard]]


class BoundarySlots:
    """Host buffers for spilled layer inputs, and `count` device buffers to restore them. With `alias` inputs
    stay where they are.

    All buffers are reused from round to round. Device buffers grow to the largest input seen; host buffers
    come from a `PinnedPool`.
    """

    def __init__(self, count: int, device: torch.device, alias: bool) -> None:
        self._device, self._alias = device, alias
        self._pool = PinnedPool(device)
        self._round = 0
        self._host_bytes: dict[tuple[int, int], int] = {}  # in this step, by unit and micro-batch
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self._held: list[torch.Tensor | None] = [None] * count

    @property
    def num_bytes(self) -> int:
        """Device bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        return self._pool.num_bytes

    def host_bytes_of(self, unit: int, micro_batch: int) -> int:
        """Host bytes of one input in the last step; 0 if it was not spilled."""
        return self._host_bytes.get((unit, micro_batch), 0)

    def begin_step(self) -> None:
        """Reclaim the host buffers of the last step, whose copies have ended."""
        self._pool.give_back()
        self._host_bytes, self._round = {}, 0

    def begin_round(self, number: int) -> None:
        """Reclaim the host buffers of the round before. The first spill of a round waits for a layer that
        runs after all backward passes of the round before, and so after its restores."""
        if number != self._round:
            self._pool.recycle()
            self._round = number

    def spill(self, unit: int, micro_batch: int, value: torch.Tensor) -> torch.Tensor:
        """Copy a layer's input to host memory, asynchronously from a GPU, and return the copy."""
        if self._alias:
            return value
        self._host_bytes[unit, micro_batch] = value.nbytes
        return self._pool.reserve(value.shape, value.dtype).copy_(value, non_blocking=True)

    def restore(self, slot: int, host: torch.Tensor) -> None:
        """Copy a spilled input into a device buffer."""
        if self._alias:
            self._held[slot] = host
            return
        # Replacing a buffer is safe: this op has waited for the last ops that read it.
        if self._buffers[slot].nbytes < host.nbytes:
            self._buffers[slot] = torch.empty(host.nbytes, dtype=torch.uint8, device=self._device)
        place = self._buffers[slot][: host.nbytes].view(host.dtype).view(host.shape)
        self._held[slot] = place.copy_(host, non_blocking=True)

    def held(self, slot: int) -> torch.Tensor:
        value = self._held[slot]
        assert value is not None, f"boundary slot {slot} is empty"
        return value

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """The input in a slot; none if it stayed where it was."""
        value = self._held[slot]
        return [] if value is None or self._alias else [value]
