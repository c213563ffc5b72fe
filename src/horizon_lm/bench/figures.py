"""The formulas of every figure that is reported.

    model FLOPs     6 N tokens + 6 L d sum(l^2)                     (run/flops.py; PaLM, appendix B)
    hardware FLOPs  model FLOPs + one more forward of each layer that is recomputed:
                    2 N_r tokens + 2 L_r d sum(l^2)                 (Korthikanti et al., 2205.05198)
    MFU, HFU        model, hardware FLOPs / seconds / peak
    practicality    tokens/s / tokens/s of the in-memory run at equal tokens a step
    bytes/parameter peak host bytes of the steps / parameters

N: parameters that multiply a token: all but the embedding table, unless the output layer shares it. Attention
is causal: a token attends to half of its sequence on average. L, N_r, L_r: layers, parameters in recomputed
layers, recomputed layers; d: width of all heads; l: length of a sequence. Padding does not occur.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horizon_lm.data.loader import StepSize
from horizon_lm.report.flops import ModelFlops, measure_peak

# Dense bf16 FLOP/s of the makers' data sheets, by a part of the device's name. MFU is quoted against these.
_PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "4090": 165e12}


@dataclass(frozen=True)
class Work:
    """model: of forward and backward. layers: of one forward pass through all layers."""

    model: ModelFlops
    layers: ModelFlops

    def model_flops(self, sequences: int, length: int) -> float:
        """Of a step of `sequences` x `length` tokens."""
        return self.model.of(_step(sequences, length))

    def hardware_flops(self, sequences: int, length: int, recomputed: float) -> float:
        """recomputed: share of the layers whose forward runs twice, 0 to 1."""
        step = _step(sequences, length)
        return self.model.of(step) + recomputed * self.layers.of(step)


def _step(sequences: int, length: int) -> StepSize:
    return StepSize(sequences * length, sequences * length, (length,) * sequences)


@dataclass(frozen=True)
class Spread:
    """Of some numbers."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f} to {self.most:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def practicality(tokens_per_second: float, in_memory: float) -> float:
    return tokens_per_second / in_memory


def curve_difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Largest relative difference of two loss curves over the steps that both have."""
    return max((abs(a - b) / abs(b) for a, b in zip(one, two, strict=False)), default=float("nan"))


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, where the figure is from): a data sheet, or a large matrix product on this device."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, value in _PEAKS.items():
            if part in name:
                return value, "data sheet, dense bf16"
    return measure_peak(device, dtype), "a large matrix product on this device"
