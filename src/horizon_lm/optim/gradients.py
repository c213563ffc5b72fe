"""Gradients in host memory: added up, or copied to where the update reads them and measured on the way.

Each takes one pass of C++ (csrc/gradients.cpp) if that was built, else torch operations. Both are bitwise
identical for any instruction set and number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from horizon_lm.memory.shards import BLOCK
from horizon_lm.optim.kernel import ISAS, library

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 64  # as in csrc/gradients.cpp
_CHUNK = 1 << 18  # elements of the reference's temporaries; whole blocks


def add_gradients(
    total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, begins: bool, isa: str = "auto"
) -> None:
    """Compute total = (total + first) + second; if it `begins`, total counts as 0.

    All have one shape and are contiguous, in host memory, bf16 or fp32; first and second have one dtype. Two
    are added at a time, since a sum costs the memory traffic of reading and writing the total. A sum in bf16
    is torch's: it occurs if one parameter is used twice by code that writes a gradient once.
    """
    lib = _library(total, first, second) if total.dtype == torch.float32 else None
    if lib is None or first.dtype != second.dtype:
        _add(total.view(-1), first.reshape(-1), begins)
        _add(total.view(-1), second.reshape(-1), False)
        return
    runs = total.data_ptr(), first.data_ptr(), second.data_ptr(), _DTYPES.index(first.dtype), int(begins)
    _check(lib.horizon_add_gradients(*runs, total.numel(), ISAS.index(isa), torch.get_num_threads()), isa)


def add_gradient(total: torch.Tensor, gradient: torch.Tensor, *, begins: bool) -> None:
    """Compute total = total + gradient, or copy the gradient if it `begins`: one of `add_gradients`, for
    which there is no second. Same bits; piece by piece, so that the widened piece stays in the cache."""
    _add(total.view(-1), gradient.reshape(-1), begins)


def add_in_order(total: torch.Tensor, parts: Sequence[torch.Tensor], *, begins: bool) -> None:
    """Add gradients [n] (bf16 or fp32) to total [n] (fp32) one after the other; the first overwrites it if it
    `begins`. In host memory or on a device; in host memory two at a time (`add_gradients`), same bits."""
    if total.device.type != "cpu":
        for i, part in enumerate(parts):
            if begins and i == 0:
                total.copy_(part)
            else:
                total.add_(part)
        return
    while len(parts) >= 2:
        add_gradients(total, parts[0], parts[1], begins=begins)
        parts, begins = parts[2:], False
    for part in parts:
        add_gradient(total, part, begins=begins)


def move_gradient(source: torch.Tensor, target: torch.Tensor, *, isa: str = "auto") -> torch.Tensor:
    """Copy a gradient [n] to target [n], each bf16 or fp32 in host memory, and return its squares: the sums
    over each 4096 elements, fp64.

    They are of the rounded values (to nearest, ties to even), which the update reads. Sums are fp32 over 64
    elements and fp64 beyond. If target is source, it is only measured.
    """
    squares = torch.empty(-(-source.numel() // BLOCK), dtype=torch.float64)
    lib = _library(source, target)
    if lib is None:
        _move(source, target, squares)
    else:
        runs = source.data_ptr(), _DTYPES.index(source.dtype), target.data_ptr(), _DTYPES.index(target.dtype)
        rest = squares.data_ptr(), source.numel(), ISAS.index(isa), torch.get_num_threads()
        _check(lib.horizon_move_gradient(*runs, *rest), isa)
    return squares


def ordered_sum(squares: torch.Tensor, start: float = 0.0) -> float:
    """Add squares [blocks] to `start` one by one, in fp64; waits for the device.

    A sum of several parts is thus that of the whole, and the same for any number of threads.
    """
    return float(np.cumsum(np.concatenate(([start], squares.cpu().numpy())))[-1])


def _library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """Return the library if it can take these: contiguous, of a supported dtype, not fake.

    Under a dispatch mode (the planner, the race detector of the tests) torch operations serve.
    """
    assert len({tensor.numel() for tensor in tensors}) == 1
    if _get_current_dispatch_mode() is not None:
        return None
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or not tensor.is_contiguous() or tensor.dtype not in _DTYPES:
            return None
    return library()


def _check(status: int, isa: str) -> None:
    if status:
        raise ValueError(f"isa={isa!r} is not available here")


# The torch reference: serves without a compiler, and tests compare the C++ with it.


def _add(total: torch.Tensor, gradient: torch.Tensor, begins: bool) -> None:
    """Widens piece by piece: torch adds bf16 to fp32 element by element, ten times as slowly.

    Fake tensors stand for the C++: one pass, whose bytes a plan counts.
    """
    if begins:
        total.copy_(gradient)
        return
    if type(total) is not torch.Tensor:
        total.add_(gradient)
        return
    for part, piece in zip(total.split(_CHUNK), gradient.split(_CHUNK), strict=True):
        part.add_(piece.to(total.dtype))


def _move(source: torch.Tensor, target: torch.Tensor, squares: torch.Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)
    runs = zip(target.split(_CHUNK), squares.split(_CHUNK // BLOCK), strict=True)
    for piece, found in runs:
        whole = torch.zeros(found.numel() * BLOCK)
        whole[: piece.numel()] = piece
        lanes = torch.zeros(found.numel(), _LANES)
        for row in whole.view(found.numel(), BLOCK // _LANES, _LANES).unbind(1):
            lanes += row * row
        found.copy_(lanes.double().cumsum(1)[:, -1])
