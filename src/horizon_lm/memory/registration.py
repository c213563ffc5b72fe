"""Page-lock fresh host memory: touch and register it with CUDA in parallel pieces, near the device.

Each piece holds whole tensors and is one registration. CUDA rejects a copy that leaves a registration
(cuMemcpy: "Memory regions requested must be either entirely registered with CUDA, or [...] not registered at
all") or spans two (sgl-project/sglang#36798), and drivers from 580 on reject a registration of 512 GiB or
more.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine import numa
from horizon_lm.machine.cores import usable_cores
from horizon_lm.words import size

_MADV_DONTFORK, _MADV_POPULATE_WRITE = 10, 23  # of linux/mman.h; the second since Linux 5.14
_TOUCHED_BYTES = 256 << 20  # by one thread at a time
# What PyTorch's documentation recommends for pinned_num_register_threads.
_MOST_THREADS = 8


@dataclass
class _Piece:
    """Pages to register. registered: addresses already registered, for all pieces of the same storage."""

    start: int
    end: int
    registered: list[int]

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def pin(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """Page-lock the pages of tensors for copies from and to a CUDA device, until their storages are released.

    tensors: made of fresh zero pages; pinning may zero them again. Raises DoesNotFitError if the system or
    CUDA refuses. After an error or interrupt nothing stays registered.
    """
    runtime = torch.cuda.cudart()
    pieces = list(_pieces(tensors, runtime))
    if not pieces:
        return
    node = numa.node_of(device)
    for piece in pieces:
        if node is not None:
            numa.prefer(node, piece.start, piece.num_bytes)
        # A child process must not share pages that the device accesses: after a fork, a write would copy them
        # away from the device.
        _madvise(piece.start, piece.num_bytes, _MADV_DONTFORK)
    # Threads are used even for one piece: CUDA reports a rejected registration again at the next kernel that
    # the same thread launches, and these threads launch none.
    index = torch.cuda.current_device() if device.index is None else device.index
    threads = ThreadPoolExecutor(
        min(_MOST_THREADS, usable_cores()), "horizon-pin", torch.cuda.set_device, (index,)
    )
    try:
        list(threads.map(_touch, *zip(*_chunks(pieces), strict=True)))
        list(threads.map(_register, pieces, itertools.repeat(runtime)))
    except BaseException:
        try:
            threads.shutdown(cancel_futures=True)
        finally:
            for piece in pieces:
                _unregister(runtime, piece.registered)
        raise
    threads.shutdown()


def _pieces(tensors: Sequence[torch.Tensor], runtime: Any) -> Iterator[_Piece]:
    """Yield the pages of each tensor; tensors that share a page form one piece. A storage's pieces are
    unregistered when its last view is gone, before it releases the mapping."""
    held: dict[int, list[int]] = {}
    last: _Piece | None = None
    for tensor in sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr):
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start, end = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        if last is not None and start < last.end:
            last.end = max(last.end, end)
            continue
        if last is not None:
            yield last
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            registered = held[storage.data_ptr()] = []
            weakref.finalize(storage, _unregister, runtime, registered)
        last = _Piece(start, end, held[storage.data_ptr()])
    if last is not None:
        yield last


def _chunks(pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) that one thread touches, cut at boundaries of huge pages."""
    for piece in pieces:
        start = piece.start
        while start < piece.end:
            end = min(piece.end, (start // _TOUCHED_BYTES + 1) * _TOUCHED_BYTES)
            yield start, end - start
            start = end


def _touch(address: int, num_bytes: int) -> None:
    """Make the kernel provide the pages. Both calls release the GIL."""
    if _madvise(address, num_bytes, _MADV_POPULATE_WRITE):
        return
    if ctypes.get_errno() == errno.ENOMEM:
        raise DoesNotFitError(
            f"the system refused {size(num_bytes)} of host memory when its pages were touched",
            hint="free memory, raise the limit (cgroup), or choose a smaller model",
        )
    ctypes.memset(address, 0, num_bytes)


def _madvise(address: int, num_bytes: int, advice: int) -> bool:
    call = ctypes.CDLL(None, use_errno=True).madvise
    return call(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice) == 0


def _register(piece: _Piece, runtime: Any) -> None:
    status = runtime.cudaHostRegister(piece.start, piece.num_bytes, 0)
    if int(status) != 0:
        reason = runtime.cudaGetErrorString(status)
        raise DoesNotFitError(
            f"CUDA refused to pin {size(piece.num_bytes)} of host memory (cudaHostRegister: {reason})",
            hint="raise the locked-memory limit (ulimit -l unlimited) or choose a smaller model",
        )
    piece.registered.append(piece.start)


def _unregister(runtime: Any, registered: list[int]) -> None:
    while registered:
        runtime.cudaHostUnregister(registered.pop())
