"""Reported figures: their formulas, and rows of results as cells of a table.

    model FLOPs     6 N tokens + 6 L d sum(l^2)                     (report/flops.py; PaLM, appendix B)
    hardware FLOPs  model FLOPs + one more forward of each recomputed layer:
                    2 N_r tokens + 2 L_r d sum(l^2)                 (Korthikanti et al., 2205.05198)
    MFU, HFU        model, hardware FLOPs / seconds / peak
    speed           tokens/s / tokens/s of the in-memory run at equal tokens per step
    bytes/parameter peak host bytes during the steps / parameters

N: parameters that multiply a token (all but the embedding table, unless the output layer shares it).
L, N_r, L_r: layers, parameters in recomputed layers, recomputed layers. d: total width of the heads.
l: sequence length; attention is causal, so a token attends to half of its sequence on average. No padding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from horizon_lm.report.flops import measure_peak

# Dense bf16 FLOP/s from data sheets, by a part of the device's name. MFU is quoted against these.
PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "4090": 165e12}

HEAD = ["system", "tokens/s, median (least to most)", "MFU", "HFU", "host peak GB", "pinned GB"]
HEAD += ["device peak GB", "host B/parameter", "speed / in-memory", "loss, last"]

Row = dict[str, Any]  # the result of one system; JSON


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f} to {self.most:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return (peak FLOP/s, its source): a data sheet, or a large matrix product on this device."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, value in PEAKS.items():
            if part in name:
                return value, "data sheet, dense bf16"
    return measure_peak(device, dtype), "a large matrix product on this device"


def cells(name: str, row: Row, *, peak: float, in_memory: float | None = None) -> list[str]:
    """Format a row under HEAD. peak: FLOP/s; in_memory: tokens/s of the in-memory run at equal tokens."""
    if row.get("status") != "done":
        return [name, f"{row.get('status', 'not run')}: {row.get('why', '')}", *[""] * (len(HEAD) - 2)]
    rate, least, most = row["tokens_per_second"]
    seconds = _tokens(row) / rate
    peaks, info = row["peaks"], row.get("info", {})
    pinned = info.get("pinned", peaks["pinned"])
    return [
        name,
        f"{rate:,.0f} ({least:,.0f} to {most:,.0f})",
        f"{row['model_flops'] / seconds / peak:.1%}",
        f"{row['hardware_flops'] / seconds / peak:.1%}",
        f"{peaks['host'] / 1e9:.2f}",
        f"{pinned / 1e9:.2f}",
        f"{peaks['device'] / 1e9:.2f}",
        f"{row['host_bytes_per_parameter']:.1f}",
        f"{rate / in_memory:.3f}" if in_memory else "",
        f"{row['losses'][-1]:.4f}",
    ]


def _tokens(row: Row) -> int:
    return int(row["case"]["sequences"]) * int(row["case"]["length"])


def lane_lines(found: dict[str, Any]) -> list[str]:
    """Format a breakdown (`ours.breakdown`) as lines of text."""
    lines = [f"one recorded step of {found['seconds'] * 1e3:.1f} ms:"]
    for lane, values in found["lanes"].items():
        lines.append(f"  {lane:<14}{values['busy_seconds'] * 1e3:>12.1f} ms{values['share']:>8.0%}")
    lines.append(f"  {found['hidden']:.0%} of the other lanes' time is hidden under compute")
    moved = {name.replace("_", " "): f"{size / 1e9:.3f} GB" for name, size in found["moved"].items()}
    lines.append("  moved: " + ", ".join(f"{size} {name}" for name, size in moved.items()))
    return lines
