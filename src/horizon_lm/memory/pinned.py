"""A pool of pinned host blocks for copies between host and device during a step.

PyTorch's own cache of pinned blocks rounds each up to a power of two; these have exactly the requested size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from horizon_lm.memory import arena

_here = threading.local()  # pool: in use in this thread


class PinnedPool:
    """Blocks that are reserved during a step and returned together before the next one begins, or recycled
    within it.

    A request gets the smallest free block that is large enough. If there is none, a block of exactly the
    requested size replaces the largest free block, or is added if no block is free. So the pool never has
    more blocks than one step used, and none larger than the largest request. A step whose requests have been
    served before always finds its blocks, because no replacement is smaller than the block it replaces.

    device: the device whose copies the blocks serve. Unless it is a CUDA device, they are not pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.Tensor] = []  # uint8, the smallest first
        self._reserved: list[torch.Tensor] = []
        self._replaced: list[torch.Tensor] = []  # which a copy may still be reading
        self._is_recycled = False
        self._lock = threading.Lock()  # lanes reserve from threads of their own

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in (*self._free, *self._reserved, *self._replaced))

    def take(self, tensor: torch.Tensor, most: int = 0) -> torch.Tensor:
        """Return a pinned copy of a host tensor, valid until `give_back`; without CUDA, the tensor itself.

        most: elements to reserve if the tensor's size depends on values, so that other values in later steps
        need no larger block.
        """
        if self._device.type != "cuda":
            return tensor
        room = self.reserve(torch.Size([max(most, tensor.numel())]), tensor.dtype)
        return room[: tensor.numel()].view(tensor.shape).copy_(tensor)

    def reserve(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor, valid until `give_back`. Raises DoesNotFitError."""
        num_bytes = shape.numel() * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            place = next((i for i, block in enumerate(self._free) if block.nbytes >= num_bytes), None)
            if place is not None:
                block = self._free.pop(place)
            else:
                if self._is_recycled:
                    self._replaced += self._free[-1:]
                self._free[-1:] = []  # released first: both might not fit
                block = arena.allocate(num_bytes, pin_for=self._device)
            self._reserved.append(block)
        return block[:num_bytes].view(dtype).view(shape)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While open, `pinned` in the calling thread takes from this pool."""
        before, _here.pool = getattr(_here, "pool", None), self
        try:
            yield
        finally:
            _here.pool = before

    def give_back(self) -> None:
        """Take back all blocks. Call it only while no copy from or to them is in flight."""
        with self._lock:
            self._collect()
            self._replaced, self._is_recycled = [], False

    def recycle(self) -> None:
        """Take back all blocks while copies from them are in flight that later writers wait for on the
        device. Until `give_back` the blocks are reused, but none is freed."""
        with self._lock:
            self._collect()
            self._is_recycled = True

    def _collect(self) -> None:
        self._free, self._reserved = sorted([*self._free, *self._reserved], key=lambda b: b.nbytes), []


def pinned(tensor: torch.Tensor, most: int = 0) -> torch.Tensor:
    """Return a copy as `PinnedPool.take` does, from the pool of the step that the calling thread works on.

    Outside of a step, return the tensor itself; its copy to a device then blocks.
    """
    pool = getattr(_here, "pool", None)
    return tensor if pool is None else pool.take(tensor, most)
