"""Slots: device buffers for weights, gradients and stored inputs.

Slots live as long as the model. With `alias` (on the CPU) a weight slot is the store's own buffer, and a
gradient slot the store's gradient buffer if dtypes match: no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from horizon_lm.memory import arena
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.store import HostStore
from horizon_lm.schedule import StepSpec


class UnitWeights(NamedTuple):
    """A unit's weights on the device: 1-D [numel], and the residuals of its wide parameters (int16
    [wide_numel])."""

    weights: torch.Tensor
    wide_residual: torch.Tensor


def slot_bytes(units: Sequence[UnitLayout], plan: StepSpec, dtype: torch.dtype) -> dict[str, int]:
    """Predict the bytes of the weight and gradient slots. Gradients accumulate in fp32."""
    weights = max((units[u].slot_numel for u in plan.uploaded), default=0)
    downloaded = [u for u in plan.trainable if u <= plan.head]
    gradients = max((units[u].trainable_numel for u in downloaded), default=0)
    return {
        "weight_slots": plan.slots * weights * dtype.itemsize,
        "gradient_slots": plan.grad_slots * gradients * torch.float32.itemsize,
    }


class WeightSlots:
    """`count` device buffers, each as large as the largest uploaded unit."""

    def __init__(
        self, store: HostStore, uploaded: frozenset[int], count: int, device: torch.device, alias: bool
    ) -> None:
        self._store = store
        self._alias = alias
        self.capacity = max(store.units[u].slot_numel for u in uploaded)
        self._buffers = []
        if not alias:
            self._buffers = [
                torch.empty(self.capacity, dtype=store.dtype, device=device) for _ in range(count)
            ]

    @property
    def num_bytes(self) -> int:
        """Device bytes of the slots; 0 if they alias the store."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def upload(self, slot: int, unit: int) -> None:
        """Copy the unit's weights into the slot, asynchronously if the host memory is pinned."""
        if self._alias:
            return
        target = self.unit(slot, unit)
        target.weights.copy_(self._store.run("weights", unit), non_blocking=True)
        if target.wide_residual.numel():
            target.wide_residual.copy_(self._store.wide_residual(unit), non_blocking=True)

    def unit(self, slot: int, unit: int) -> UnitWeights:
        """The unit's weights in a slot."""
        if self._alias:
            return UnitWeights(self._store.run("weights", unit), self._store.wide_residual(unit))
        layout, buffer = self._store.units[unit], self._buffers[slot]
        if not layout.wide_numel:
            return UnitWeights(buffer[: layout.numel], torch.empty(0, dtype=torch.int16))
        return UnitWeights(buffer[: layout.numel], buffer[layout.numel : layout.slot_numel].view(torch.int16))

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """The slot's buffer; none if it aliases the store."""
        return [] if self._alias else [self._buffers[slot]]


class GradientSlots:
    """`count` device buffers, each for one unit's gradient while it accumulates.

    A gradient that is written once has the store's dtype; one that is added to (several micro-batches or loss
    chunks) accumulates in fp32.
    """

    def __init__(
        self, store: HostStore, units: frozenset[int], count: int, device: torch.device, alias: bool
    ) -> None:
        self._store = store
        self.alias = alias
        self._device = device
        self._count = count
        self.capacity = max((store.units[u].trainable_numel for u in units), default=0)
        self._buffers: list[torch.Tensor] = []
        if not alias:
            self.reserve()  # now, not during the first step on another stream

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self) -> None:
        """Allocate the buffers; with `alias`, only once a gradient needs fp32 in a bf16 store."""
        if not self._buffers:
            size = self.capacity * torch.float32.itemsize
            self._buffers = [
                torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self._count)
            ]

    def is_alias(self, dtype: torch.dtype) -> bool:
        """Whether a gradient of this dtype accumulates in the store itself."""
        return self.alias and dtype == self._store.dtype

    def run(self, grad_slot: int, unit: int, dtype: torch.dtype) -> torch.Tensor:
        """The slot as the unit's gradient buffer [trainable_numel] of `dtype`."""
        self.reserve()
        return self._buffers[grad_slot].view(dtype)[: self._store.units[unit].trainable_numel]

    def tensors(self, grad_slot: int) -> list[torch.Tensor]:
        """The slot's buffer, as fp32; none if none was allocated."""
        return [self._buffers[grad_slot].view(torch.float32)] if self._buffers else []


class BoundarySlots:
    """Host buffers for spilled layer inputs, and `count` device buffers to restore them. With `alias` inputs
    stay where they are.

    All buffers are reused from step to step and grow to the largest input seen.
    """

    def __init__(self, count: int, device: torch.device, alias: bool) -> None:
        self._device, self._alias = device, alias
        self._host: dict[tuple[int, int], torch.Tensor] = {}  # uint8, by unit and micro-batch
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self._held: list[torch.Tensor | None] = [None] * count

    @property
    def num_bytes(self) -> int:
        """Device bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        return sum(host.nbytes for host in self._host.values())

    def host_bytes_of(self, unit: int, micro_batch: int) -> int:
        """Host bytes of one spilled input; 0 if none was spilled."""
        host = self._host.get((unit, micro_batch))
        return 0 if host is None else host.nbytes

    def spill(self, unit: int, micro_batch: int, value: torch.Tensor) -> torch.Tensor:
        """Copy a layer's input to host memory, asynchronously from a GPU, and return the copy."""
        if self._alias:
            return value
        host = self._host.get((unit, micro_batch))
        if host is None or host.nbytes < value.nbytes:
            host = arena.allocate(value.nbytes, pin=self._device.type == "cuda")
            self._host[unit, micro_batch] = host
        place = host[: value.nbytes].view(value.dtype).view(value.shape)
        return place.copy_(value, non_blocking=True)

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
