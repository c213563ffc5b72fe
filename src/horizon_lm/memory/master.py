"""An fp32 master in 4 bytes that also holds its bf16 rounding: weights (bf16) + residual (int16).

`master_bits = (weight_bits << 16) + residual`, with `weight` the master rounded to nearest even.
65,537 masters round to a bf16 with an even last bit, both half-way points among them, and a residual has
65,536 values. So one master in 131,072 cannot be kept: the one an fp32 ulp below the upper half-way point.
It is stored one ulp lower, with residual 0x7FFE, and 0x7FFF beside an even weight stands for +0x8000, the
half-way point itself. Every other finite master is kept exactly, hence all that fp16, bf16 or TF32 can hold
(their last 13 bits in fp32 are 0). What is stored is always reconstructed exactly.
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
        w.copy_(bits.view(torch.float32))
        lower = bits & 0x1FFFF  # with the weight's last bit
        bits = bits - ((lower == 0x7FFF) | (lower == 0x8000)).to(torch.int32)
        r.copy_(bits - (w.view(torch.int16).to(torch.int32) << 16))


def join_master(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 `weight` and int16 `residual` as a new tensor of their shape."""
    upper = weight.view(torch.int16)
    bits = upper.to(torch.int32).bitwise_left_shift_(16).add_(residual)
    half_way = (residual == 0x7FFF).logical_and_(upper & 1 == 0)
    return bits.add_(half_way).view(torch.float32)
