"""What a step computes, and which part of the device's power that is (MFU).

Model FLOPs of a step = 6 N tokens + 6 L d sum(l²), with N the parameters that multiply a token (all but the
embedding table, unless the output layer shares it; of experts, those that a token visits), L layers of
attention of total head width d, and l the length of each piece of text that attends to itself. Recomputation
is not counted, nor is padding. MFU = model FLOPs / seconds / peak.

A frozen parameter counts 4 in place of 6, as its own gradient is not computed, and 2 where nothing before
it is trained either, as no gradient passes there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batches import StepSize

FORMULA = "(6 N tokens + 6 L d sum of squared lengths) / seconds / peak; N without the embedding table"


@dataclass(frozen=True)
class ModelFlops:
    """per_token: 6 N; per_square: 6 L d."""

    per_token: float
    per_square: float

    def of(self, size: StepSize) -> float:
        """FLOPs of forward and backward of a step, without recomputation."""
        return self.per_token * size.tokens + self.per_square * size.squares


def count_flops(
    parameters: dict[str, int],
    embedding: str | None,
    config: Any,
    *,
    factors: dict[str, int] | None = None,
    share_backward: float = 1.0,
) -> ModelFlops:
    """parameters: name to number of elements. embedding: the table, None where the output layer shares it.

    config: the transformers configuration of the text model. factors: FLOPs of a parameter and token where
    they are not 6. share_backward: of the layers, those through which gradients pass.
    """
    share = _share_of_experts(config)
    total = 0.0
    for name, count in parameters.items():
        if name != embedding:
            factor = (factors or {}).get(name, 6) / 6
            total += count * (share if ".experts." in name else 1.0) * factor
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    width = int(getattr(config, "head_dim", 0) or 0) * heads or int(getattr(config, "hidden_size", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return ModelFlops(6 * total, (2.0 + 4.0 * share_backward) * layers * width)


def _share_of_experts(config: Any) -> float:
    """Experts that a token visits, of all; 1 for a model without."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config, name, None)
        if count:
            return float(getattr(config, "num_experts_per_tok", count) or count) / float(count)
    return 1.0


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: the best of a few, after one to warm up."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _settle(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _settle(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
