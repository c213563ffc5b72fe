"""Masters as bits."""

from __future__ import annotations

import torch


def to_bits(value: torch.Tensor) -> torch.Tensor:
    """int32 patterns: comparable where values are zeros of two signs."""
    return value.contiguous().view(torch.int32)


def is_moved(master: torch.Tensor) -> torch.Tensor:
    """The one master in 131,072 that has no room: an fp32 ulp below an upper tie."""
    return (to_bits(master).to(torch.int64) & 0x1FFFF) == 0x7FFF
