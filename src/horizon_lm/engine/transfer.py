"""The gradient of a unit on its way to host memory: cast, squared norm, copy, piece by piece."""

from __future__ import annotations

import torch

# Elements of a piece. On the CPU a piece stays in the L2 cache; on a GPU it is 64 MB of fp32.
# Sums of squares are fp32 within a piece and fp64 over pieces: one fp32 sum over 2**26 elements
# was seen to be 1 % off on the CPU.
_PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}
_ROW = 512


def download_gradient(run: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy a gradient run [n] (bf16 or fp32, device) into its host run [n] and return its squared norm.

    The norm is that of the values the optimizer will read (after rounding to the host dtype); a
    scalar on the device, so that the host makes no pass over gradients to measure them.
    """
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    size = min(_PIECE[run.device.type], run.numel())
    rounded = torch.empty(size, dtype=target.dtype, device=run.device)
    wide = torch.empty(size, dtype=torch.float32, device=run.device)
    aliased = run.data_ptr() == target.data_ptr()
    for piece, home in zip(run.split(size), target.split(size), strict=True):
        if piece.dtype != target.dtype:
            piece = rounded[: piece.numel()].copy_(piece)
        if not aliased:
            home.copy_(piece, non_blocking=True)
        total += _square_norm(piece, wide)
    return total


def square_norm(run: torch.Tensor) -> torch.Tensor:
    """Squared norm of a gradient run [n] (bf16 or fp32) where it is; an fp64 scalar."""
    return download_gradient(run, run)


def _square_norm(piece: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Sum of squares in fp32; `wide` is room for a piece that has to be widened."""
    if piece.dtype != torch.float32:
        piece = wide[: piece.numel()].copy_(piece)
    if piece.device.type != "cpu":
        return torch.dot(piece, piece)
    # A dot product is cut into as many parts as there are threads, and a sum of other parts has other
    # bits. These rows are each summed by one thread, and there are too few of them to be cut.
    whole = piece.numel() - piece.numel() % _ROW
    rows, rest = piece[:whole].view(-1, 1, _ROW), piece[whole:]
    return torch.bmm(rows, rows.transpose(1, 2)).sum(dtype=torch.float64) + torch.dot(rest, rest)


def sum_of_squares(rows: torch.Tensor) -> float:
    """Of all elements of rows [r, width] in host memory, in fp64, whatever the number of threads."""
    return float(sum(float(part.sum()) for part in rows.double().square().sum(1).split(1 << 14)))
