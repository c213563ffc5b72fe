"""Gradients in host memory: added up, or brought to where the update reads them and measured on the way.

Each in one pass of C++ (csrc/gradients.cpp) where that was built, else in torch operations that give the
same bits. Those depend on neither the instruction set nor the number of threads.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .kernel import ISAS, library

_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK, _LANES = 4096, 64  # as in csrc/gradients.cpp
_CHUNK = 1 << 18  # elements of the reference's temporaries; whole blocks


def add_gradient(total: torch.Tensor, gradient: torch.Tensor, *, isa: str = "auto") -> None:
    """total += gradient, both of one shape and contiguous, in host memory; gradient bf16 or fp32, as total.

    A sum in bf16 is torch's: it is met where one parameter is used twice by what writes a gradient once.
    """
    lib = _library(total, gradient) if total.dtype == torch.float32 else None
    if lib is None:
        _add(total.view(-1), gradient.reshape(-1))
        return
    arguments = total.data_ptr(), gradient.data_ptr(), _DTYPES.index(gradient.dtype), total.numel()
    _check(lib.horizon_add_gradient(*arguments, ISAS.index(isa), torch.get_num_threads()), isa)


def move_gradient(source: torch.Tensor, target: torch.Tensor, *, isa: str = "auto") -> float:
    """Copy a gradient [n] to target [n], each bf16 or fp32 in host memory, and return its squared norm.

    The norm is of what the update will read, that is after rounding (to nearest, ties to even). Sums are
    fp32 over 64 elements and fp64 beyond. target may be source, which is then measured where it is.
    """
    squares = torch.empty(-(-source.numel() // _BLOCK), dtype=torch.float64)
    lib = _library(source, target)
    if lib is None:
        _move(source, target, squares)
    else:
        runs = source.data_ptr(), _DTYPES.index(source.dtype), target.data_ptr(), _DTYPES.index(target.dtype)
        rest = squares.data_ptr(), source.numel(), ISAS.index(isa), torch.get_num_threads()
        _check(lib.horizon_move_gradient(*runs, *rest), isa)
    # One after another, whatever the number of threads: torch's own sum is cut over them.
    return float(np.cumsum(squares.numpy())[-1]) if squares.numel() else 0.0


def _library(first: torch.Tensor, second: torch.Tensor) -> ctypes.CDLL | None:
    """The library, where it can take both: contiguous, of a dtype that it knows, and no fake tensors."""
    assert first.numel() == second.numel()
    for tensor in (first, second):
        if type(tensor) is not torch.Tensor or not tensor.is_contiguous() or tensor.dtype not in _DTYPES:
            return None
    return library()


def _check(status: int, isa: str) -> None:
    if status:
        raise ValueError(f"isa={isa!r} is not available here")


# In torch: serves without a compiler, and tests compare the C++ with it.


def _add(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """Widened first, piece by piece: torch adds bf16 to fp32 element by element, ten times as slowly.

    Tensors without memory stand for the C++: one pass, whose bytes a plan counts."""
    if type(total) is not torch.Tensor:
        total.add_(gradient)
        return
    for part, piece in zip(total.split(_CHUNK), gradient.split(_CHUNK), strict=True):
        part.add_(piece.to(total.dtype))


def _move(source: torch.Tensor, target: torch.Tensor, squares: torch.Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)
    runs = zip(target.split(_CHUNK), squares.split(_CHUNK // _BLOCK), strict=True)
    for piece, found in runs:
        whole = torch.zeros(found.numel() * _BLOCK)
        whole[: piece.numel()] = piece
        lanes = torch.zeros(found.numel(), _LANES)
        for row in whole.view(found.numel(), -1, _LANES).unbind(1):
            lanes += row * row
        found.copy_(lanes.double().cumsum(1)[:, -1])
