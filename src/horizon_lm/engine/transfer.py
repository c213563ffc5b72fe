"""The gradient of a unit on its way to host memory: cast, squared norm, copy, piece by piece."""

from __future__ import annotations

import torch

_PIECE = 1 << 24  # elements: the bounce buffer is 32 MB in bf16


def download_gradient(run: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy a gradient run [n] (bf16 or fp32, device) into its host run [n] and return its squared norm.

    The norm is that of the values the optimizer will read (after rounding to the host dtype),
    summed in fp64 over pieces; a scalar on the device, so that the host makes no pass over gradients.
    """
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    aliased = run.data_ptr() == target.data_ptr()
    for piece, home in zip(run.split(_PIECE), target.split(_PIECE), strict=True):
        rounded = piece.to(target.dtype)
        total += torch.linalg.vector_norm(rounded, dtype=torch.float32).double().square()
        if not aliased:
            home.copy_(rounded, non_blocking=True)
    return total
