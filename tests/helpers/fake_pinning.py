"""CUDA's page-locking on the CPU: what is registered, and by how many calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from horizon_lm.machine import numa

CUDA = torch.device("cuda", 0)
_REFUSED = 2  # cudaErrorMemoryAllocation


class Runtime:
    """The calls of `torch.cuda.cudart()` that pin memory, and name an error.

    registered: bytes by address. pins: calls that pinned something, whichever way. unknown: calls that
    unregistered what was not. refuses: given the number of the call, whether CUDA refuses it.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.pins: list[str] = []
        self.unknown = 0
        self.refuses: Callable[[int], bool] = lambda call: False
        self._lock = threading.Lock()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        with self._lock:
            self.pins.append("cudaHostRegister")
            if self.refuses(len(self.pins)):
                return _REFUSED
            for other, size in self.registered.items():
                assert address >= other + size or address + num_bytes <= other, "registered twice"
            self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        with self._lock:
            self.unknown += self.registered.pop(address, None) is None
        return 0

    def cudaGetErrorString(self, status: int) -> str:  # noqa: N802
        assert status == _REFUSED
        return "out of memory"

    def holding(self, tensor: torch.Tensor) -> int:
        """How many registrations hold all of a tensor: 1, or copies of it are refused or slow."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(address <= start and end <= address + size for address, size in self.registered.items())

    def touching(self, tensor: torch.Tensor) -> int:
        """How many registrations hold some of a tensor."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(address < end and start < address + size for address, size in self.registered.items())


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()

    def pin_memory(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        runtime.pins.append("pin_memory")
        return tensor

    def empty(*args: Any, pin_memory: bool = False, real: Any = torch.empty, **options: Any) -> torch.Tensor:
        runtime.pins += ["empty"] * pin_memory
        return real(*args, **options)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory, raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(numa, "node_of", lambda device: None)
    yield runtime
