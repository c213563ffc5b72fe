"""Bytes that tensors occupy while code runs, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """While open, tracks every storage that operations of this thread create, until it is freed.

    now: live bytes created since entering. peak: their maximum (`restart` resets it). Memory that a kernel
    allocates and frees internally is not seen.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never compiled, so torch neither wraps each call nor imports its compiler."""
        return False

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        """note: called with ("alloc", number of the storage) and its bytes, and ("free", number)."""
        super().__init__()
        self.now = self.peak = 0
        self._note, self._count = note, 0
        self._known = WeakIdKeyDictionary()

    def restart(self) -> int:
        """Reset the peak; return the bytes live now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = _storage(leaf)
            if storage is not None and id(storage) not in given and storage not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                self._count += 1
                if self._note is not None:
                    self._note(("alloc", self._count), size)
                weakref.finalize(storage, self._freed, size, self._count)
        return out

    def _freed(self, size: int, number: int) -> None:
        self.now -= size
        if self._note is not None:
            self._note(("free", number))


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None
