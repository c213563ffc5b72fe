"""Slots: device buffers for weights, gradients and stored inputs.

Slots live as long as the model. With `alias` (on the CPU) a weight slot is the store's own buffer, and a
gradient slot the store's gradient buffer if dtypes match: no copies. Resident units have no weight slot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.pinned import PinnedPool
from horizon_lm.memory.shards import Shard, UnitShard
from horizon_lm.memory.store import HostStore
from horizon_lm.schedule import StepSpec


class UnitWeights(NamedTuple):
    """A unit's weights on the device: 1-D [numel], and the residuals of its wide parameters (int16
    [wide_numel])."""

    weights: torch.Tensor
    wide_residual: torch.Tensor


def weight_slot_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each weight slot: ring slots fit prologue and layers, the outer one head and
    table."""
    sizes = {u: _shard(units[u], plan).slot_numel for u in plan.in_slots}
    return [_largest(sizes, range(plan.head))] * plan.slots + [_largest(sizes, (plan.head, plan.head + 1))]


def gradient_slot_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each gradient slot: ring, outer slot, and slots of units of their own. The ring
    fits the units without one; it is empty if there are none."""
    sizes = {u: _shard(units[u], plan).gathered_trainable_numel for u in plan.trainable}
    if plan.world > 1:
        sizes.pop(plan.head + 1, None)  # the embedding table's gradient is its rows'
    outer = _largest(sizes, (plan.head, plan.head + 1))
    own = [sizes.pop(unit) for unit in plan.own_grad_slots]
    return [_largest(sizes, range(plan.head))] * plan.grad_slots + [outer, *own]


def _shard(unit: UnitLayout, plan: StepSpec) -> UnitShard:
    return UnitShard(unit, Shard(0, plan.world))


def shard_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each buffer for a rank's share of weights."""
    sizes = {u: _shard(units[u], plan).weights_numel + _shard(units[u], plan).wide_numel for u in plan.uploaded}
    return [_largest(sizes, range(plan.head))] * plan.slots + [_largest(sizes, (plan.head, plan.head + 1))]


def gradient_shard_numels(units: Sequence[UnitLayout], plan: StepSpec) -> list[int]:
    """Return the elements of each fp32 buffer for a rank's share of a gradient, as `gradient_slot_numels`."""
    sizes = {u: _shard(units[u], plan).trainable_share for u in plan.trainable}
    outer = _largest(sizes, (plan.head, plan.head + 1))
    own = [sizes.pop(unit) for unit in plan.own_grad_shards]
    return [_largest(sizes, range(plan.head))] * plan.grad_slots + [outer, *own]


def _largest(sizes: Mapping[int, int], units: Iterable[int]) -> int:
    return max((sizes.get(unit, 0) for unit in units), default=0)


def slot_bytes(units: Sequence[UnitLayout], plan: StepSpec, dtype: torch.dtype) -> dict[str, int]:
    """Predict the bytes of the weight and gradient slots."""
    weights = sum(weight_slot_numels(units, plan)) * dtype.itemsize
    return {"weight_slots": weights, **gradient_slot_bytes(units, plan)}


def gradient_slot_bytes(
    units: Sequence[UnitLayout], plan: StepSpec, used: Collection[int] | None = None
) -> dict[str, int]:
    """Predict the bytes of the gradient slots, or of those `used`: `gradient_slots` are ring and outer slot,
    `gradient_sums` the slots of units of their own. Gradients accumulate in fp32."""
    sizes = [numel * torch.float32.itemsize for numel in gradient_slot_numels(units, plan)]
    if used is not None:
        sizes = [size if slot in used else 0 for slot, size in enumerate(sizes)]
    own = plan.outer_grad_slot + 1
    return {"gradient_slots": sum(sizes[:own])} | ({"gradient_sums": sum(sizes[own:])} if sizes[own:] else {})


class WeightSlots:
    """Device buffers of `numels` elements each."""

    def __init__(self, store: HostStore, numels: Sequence[int], device: torch.device, alias: bool) -> None:
        self._store = store
        self._alias = alias
        self._buffers = []
        if not alias:
            self._buffers = [torch.empty(n, dtype=store.dtype, device=device) for n in numels]
        self._shards: list[torch.Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Device bytes of the slots; 0 if they alias the store."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def upload(self, slot: int, unit: int) -> None:
        """Copy the unit's weights into the slot, asynchronously if the host memory is pinned; nothing for a
        resident unit."""
        if self._alias or self._store.is_resident(unit):
            return
        if self._store.spec.shard.world > 1:
            if self._shards:
                weights, residual = self._own(slot, unit)
                weights.copy_(self._store.run("weights", unit), non_blocking=True)
                residual.copy_(self._store.wide_residual(unit), non_blocking=True)
            return
        target = self.unit(slot, unit)
        target.weights.copy_(self._store.run("weights", unit), non_blocking=True)
        if target.wide_residual.numel():
            target.wide_residual.copy_(self._store.wide_residual(unit), non_blocking=True)

    def _own(self, slot: int, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank's share of a unit on the device: weights and wide residuals."""
        if not self._shards or self._store.is_resident(unit):
            return self._store.run("weights", unit), self._store.wide_residual(unit)
        buffer, numel = self._shards[slot], self._store.shards[unit].weights_numel
        wide = self._store.wide_residual(unit).numel()
        return buffer[:numel], buffer[numel : numel + wide].view(torch.int16)

    def join(self, slot: int, unit: int, ranks: Ranks) -> None:
        """Gather the unit's weights of all ranks in a slot."""
        shard, buffer = self._store.shards[unit], self._buffers[slot]
        weights, residual = self._own(slot, unit)
        _gather(ranks, weights, buffer, shard.frozen_share, shard.layout.trainable_offset, shard.trainable_share)
        if residual.numel():
            place = buffer[shard.gathered_weights_numel :].view(torch.int16)
            frozen_wide = shard.layout.trainable_offset - shard.layout.wide_offset
            _gather(ranks, residual, place, shard.frozen_wide_share, frozen_wide, shard.wide_share)

    def unit(self, slot: int, unit: int) -> UnitWeights:
        """The unit's weights in a slot; a resident unit's in the store, whatever the slot."""
        world = self._store.spec.shard.world
        if self._alias or (self._store.is_resident(unit) and world == 1):
            return UnitWeights(self._store.run("weights", unit), self._store.wide_residual(unit))
        layout, buffer = self._store.units[unit], self._buffers[slot]
        if not layout.wide_numel or not self._store.has("residual"):
            return UnitWeights(buffer[: layout.numel], torch.empty(0, dtype=torch.int16))
        begin = self._store.shards[unit].gathered_weights_numel if world > 1 else layout.numel
        return UnitWeights(buffer[: layout.numel], buffer[begin : begin + layout.wide_numel].view(torch.int16))

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """The slot's buffer; none if it aliases the store."""
        return [] if self._alias else [self._buffers[slot]]


def _gather(
    ranks: Ranks, own: torch.Tensor, place: torch.Tensor, first: int, begin: int, second: int
) -> None:
    if first:
        ranks.all_gather(own[:first], place[: first * ranks.world])
    if second:
        ranks.all_gather(own[first : first + second], place[begin : begin + second * ranks.world])


class GradientShards:
    """Device buffers for a rank's share of gradients, fp32, and one for what other ranks send."""

    def __init__(self, store: HostStore, plan: StepSpec, device: torch.device) -> None:
        self._store = store
        numels = gradient_shard_numels(store.units, plan)
        self._buffers = [torch.empty(n, dtype=torch.float32, device=device) for n in numels]
        most = max(gradient_slot_numels(store.units, plan))
        self._received = torch.empty(most * 4, dtype=torch.uint8, device=device)

    def run(self, grad_shard: int, unit: int) -> torch.Tensor:
        return self._buffers[grad_shard][: self._store.shards[unit].trainable_share]

    def received(self, unit: int, dtype: torch.dtype) -> torch.Tensor:
        return self._received.view(dtype)[: self._store.shards[unit].gathered_trainable_numel]

    def tensors(self, grad_shard: int) -> list[torch.Tensor]:
        return [self._buffers[grad_shard]]


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
            size = self._numels[grad_slot] * torch.float32.itemsize
            found = self._buffers[grad_slot] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return found

    def is_alias(self, dtype: torch.dtype) -> bool:
        """Whether a gradient of this dtype accumulates in the store itself."""
        return self.alias and dtype == self._store.dtype

    def run(self, grad_slot: int, unit: int, dtype: torch.dtype) -> torch.Tensor:
        """The slot as the unit's gradient buffer [trainable_numel] of `dtype`."""
        return self._buffer(grad_slot).view(dtype)[: self._store.units[unit].trainable_numel]

    def gathered(self, grad_slot: int, unit: int, dtype: torch.dtype) -> torch.Tensor:
        return self._buffer(grad_slot).view(dtype)[: self._store.shards[unit].gathered_trainable_numel]

    def tensors(self, grad_slot: int) -> list[torch.Tensor]:
        """The slot's buffer, as fp32; none if none was allocated."""
        found = self._buffers[grad_slot]
        return [] if found is None else [found.view(torch.float32)]


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
