"""Slots for the inputs of layers that wait in host memory for the backward pass."""

from __future__ import annotations

import torch

from horizon_lm.memory.pinned import PinnedPool


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
