"""Exact host memory: anonymous mappings with huge pages, pinned in place for a CUDA device.

PyTorch's pinned allocator rounds every block up to a power of two; these mappings have the requested size,
rounded to a page. Memory that is not pinned is touched by its first writer: moments by the update's threads,
in parallel and each on its own NUMA node.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.memory import lockable_bytes
from horizon_lm.memory.registration import pin
from horizon_lm.words import size

_MOST_TRIED = 1 << 30  # bytes of locked memory
_PIECE_BYTES = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def allocate(num_bytes: int, *, pin_for: torch.device | None = None) -> torch.Tensor:
    """Return a zero-filled uint8 tensor of exactly `num_bytes` host bytes; pages are touched on first use.

    pin_for: the device for asynchronous copies. For a CUDA device, pages are touched and page-locked now; any
    other device changes nothing. Raises DoesNotFitError if mapping or registration is rejected.
    """
    (block,) = allocate_runs([num_bytes], pin_for=pin_for)
    return block


def allocate_runs(sizes: Sequence[int], *, pin_for: torch.device | None = None) -> list[torch.Tensor]:
    """Return zero-filled uint8 tensors of these sizes. Adjacent tensors share a mapping of up to 1 GiB, which
    is pinned as one piece; no tensor crosses mappings. Otherwise as `allocate`."""
    blocks: list[torch.Tensor] = []
    runs: list[torch.Tensor] = []
    for group in _groups(sizes):
        blocks.append(_map(sum(group)))
        runs += blocks[-1].split(group)
    if pin_for is not None and pin_for.type == "cuda":
        pin(blocks, pin_for)
    return runs


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    group: list[int] = []
    for num_bytes in sizes:
        if group and sum(group) + num_bytes > _PIECE_BYTES:
            yield group
            group = []
        group.append(num_bytes)
    if group:
        yield group


def _map(num_bytes: int) -> torch.Tensor:
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise DoesNotFitError(
            f"the system refused {size(num_bytes)} of host memory: {error}",
            hint="free memory, raise the limit (ulimit -v, cgroup), or choose a smaller model",
        ) from error
    # A block below two huge pages gains nothing; a kernel without huge pages rejects the advice.
    if num_bytes >= 4 << 20:
        with suppress(AttributeError, OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def pinnable_bytes() -> int | None:
    """Bytes that may be pinned for a CUDA device; None if unlimited.

    Most drivers ignore `ulimit -l` (usually 8 MB), so this tries to pin slightly more than the limit. A limit
    above 1 GB is not tried and counts as none.
    """
    limit = lockable_bytes()
    if limit is None or limit > _MOST_TRIED or pins_beyond(limit):
        return None
    return limit


def pins_beyond(limit: int) -> bool:
    """Whether CUDA pins more than `limit` bytes; tries one megabyte more."""
    try:
        allocate(limit + (1 << 20), pin_for=torch.device("cuda"))
    except DoesNotFitError:
        return False
    return True


def return_free_memory() -> None:
    """Return freed memory that malloc retains to the system (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of unmapping it (glibc; affects the whole process).

    Call it once before training on the CPU in a loop of your own; `horizon_lm.train` does so itself. Each
    layer's activations and gradients are freed before the next layer allocates its own; returning them in
    between costs a page fault per 4 KB, some 50,000 a step at 100 M parameters: 7 to 11 % of step time. Peak
    memory rises by up to as much (`benchmarks/heap.py`). Also ends the automatic growth of malloc's limits.
    Does nothing if the environment sets limits of its own (MALLOC_*).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
