"""The gradient of a unit on its way to host memory: cast, squared norm, copy."""

from __future__ import annotations

import torch

from horizon_lm.optim.gradients import move_gradient

_PIECE = 1 << 24  # elements, 64 MB of fp32. Sums of squares are fp32 within a piece, fp64 over pieces.


def download_gradient(run: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy a gradient run [n] (bf16 or fp32, device) into its host run [n] and return its squared norm.

    The norm is that of the values the optimizer will read (after rounding to the host dtype); a
    fp64 scalar on the device, so that the host makes no pass over gradients to measure them.
    """
    if run.device.type == "cpu":
        return torch.tensor(move_gradient(run, target), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    size = min(_PIECE, run.numel())
    rounded = torch.empty(size, dtype=target.dtype, device=run.device)
    wide = torch.empty(size, dtype=torch.float32, device=run.device)
    for piece, home in zip(run.split(size), target.split(size), strict=True):
        if piece.dtype != target.dtype:
            piece = rounded[: piece.numel()].copy_(piece)
        home.copy_(piece, non_blocking=True)
        if piece.dtype != torch.float32:
            piece = wide[: piece.numel()].copy_(piece)
        total += torch.dot(piece, piece)
    return total


def square_norm(run: torch.Tensor) -> torch.Tensor:
    """Squared norm of a gradient run [n] (bf16 or fp32) in host memory; an fp64 scalar."""
    return torch.tensor(move_gradient(run, run), dtype=torch.float64)
