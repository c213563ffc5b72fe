"""An fp32 master in 4 bytes that also holds its bf16 rounding: weights (bf16) + residual (int16).

`master_bits = (weight_bits << 16) + residual`, with `weight` the master rounded to nearest even.
A signed 16-bit residual has 65,536 values, but 65,537 masters round to a bf16 with an even last
bit: both half-way points do. The upper one (1 in 131,072 of random masters) is therefore stored as
its neighbour one fp32 ulp nearer to the bf16 value. Every other finite master is kept exactly, and
what is stored is always reconstructed exactly.
"""

from __future__ import annotations

import torch

_CHUNK = 1 << 18  # elements; temporaries of a chunk stay in the cache: a quarter less time than 1 << 20


def split_master(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Write `master` (any floating-point dtype, taken as fp32) into bf16 `weight` and int16 `residual`.

    All of one shape; weight and residual contiguous.
    """
    flat = (master.contiguous().view(-1), weight.view(-1), residual.view(-1))
    for m, w, r in zip(*(t.split(_CHUNK) for t in flat), strict=True):
        bits = m.to(torch.float32).view(torch.int32)
        upper_tie = (bits & 0x1FFFF) == 0x8000
        bits = bits - upper_tie.to(torch.int32)
        w.copy_(bits.view(torch.float32))
        r.copy_(bits - (w.view(torch.int16).to(torch.int32) << 16))


def join_master(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 `weight` and int16 `residual` as a new tensor of their shape."""
    bits = weight.view(torch.int16).to(torch.int32)
    bits = bits.bitwise_left_shift_(16).add_(residual)
    return bits.view(torch.float32)
