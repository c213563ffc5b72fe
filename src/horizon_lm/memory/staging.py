"""Staging slots: device buffers for units with a packed part, on their way to a weight slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from horizon_lm.memory import packed
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.store import HostStore
from horizon_lm.schedule import StepSpec


def staging_slot_bytes(
    units: Sequence[UnitLayout], plan: StepSpec, dtype: torch.dtype, packing: str
) -> list[int]:
    """Return the bytes of each staging slot, one for each weight slot; none without packed units."""
    sizes = {u: staged_bytes(units[u], u in plan.split, dtype, packing) for u in plan.packed}
    ring = max((size for u, size in sizes.items() if u < plan.head), default=0)
    outer = max((size for u, size in sizes.items() if u >= plan.head), default=0)
    return [ring] * plan.slots + [outer] if sizes else []


def staged_bytes(layout: UnitLayout, is_split: bool, dtype: torch.dtype, packing: str) -> int:
    """Bytes of a staging slot for one unit: the packed part, then what is streamed of the others, with the
    residuals of wide parameters."""
    rest = (layout.wide_offset if is_split else layout.slot_numel) - layout.packed_numel
    padded = -(-rest * dtype.itemsize // packed.ALIGN_BYTES) * packed.ALIGN_BYTES
    return packed.packed_bytes(layout.packed_numel, packing) + padded


class StagingSlots:
    """Device buffers of `sizes` bytes. With `alias` (on the CPU) there are none: packed parts are unpacked
    from the store, and the others are read there."""

    def __init__(self, store: HostStore, sizes: Sequence[int], device: torch.device, alias: bool) -> None:
        self._store, self._alias = store, alias
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes if not alias]
        if sizes:
            packed.prepare(device)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def upload(self, staging: int, unit: int) -> None:
        """Copy what is streamed of a unit with a packed part, asynchronously if the host memory is pinned."""
        if self._alias:
            return
        store, buffer = self._store, self._buffers[staging]
        begin = 0
        for source in (store.run("packed", unit), *self._others(unit)):
            target = buffer[begin : begin + source.nbytes].view(source.dtype)
            target.copy_(source, non_blocking=True)
            begin += source.nbytes

    def unpack(self, staging: int, unit: int, slot: torch.Tensor) -> None:
        """Unpack a unit into a weight slot; the parts that are not packed are copied behind the packed one,
        unless they are read where they are."""
        store, numel = self._store, self._store.units[unit].packed_numel
        stored = store.run("packed", unit)
        if self._alias:
            packed.unpack(stored, numel, store.spec.packing, slot[:numel])
            return
        buffer, begin = self._buffers[staging], stored.nbytes
        packed.unpack(buffer[:begin], numel, store.spec.packing, slot[:numel])
        for source in self._others(unit):
            staged = buffer[begin : begin + source.nbytes].view(source.dtype)
            target = slot[numel : numel + source.numel()]
            target.view(source.dtype).copy_(staged)
            begin, numel = begin + source.nbytes, numel + source.numel()

    def _others(self, unit: int) -> list[torch.Tensor]:
        """What is streamed besides the packed part: weights in the store's dtype, residuals of wide ones."""
        store = self._store
        if store.is_split(unit):
            return [store.run("frozen", unit)]
        return [store.run("weights", unit), store.wide_residual(unit)]

    def tensors(self, staging: int) -> list[torch.Tensor]:
        """The buffer of a slot, as fp32; none if the store is used."""
        return [] if self._alias else [self._buffers[staging].view(torch.float32)]
