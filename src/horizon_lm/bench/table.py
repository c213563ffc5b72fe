"""Rows of results as cells for people."""

from __future__ import annotations

from typing import Any

from horizon_lm.bench.jobs import Row

HEAD = ["system", "tokens/s, median (least to most)", "MFU", "HFU", "host peak GB", "pinned GB"]
HEAD += ["device peak GB", "host B/parameter", "speed / in-memory", "loss, last"]


def cells(name: str, row: Row, *, peak: float, in_memory: float | None = None) -> list[str]:
    """peak: FLOP/s of the device. in_memory: tokens/s of the in-memory run at equal tokens."""
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
    """A breakdown (lanes.breakdown) in lines of text."""
    lines = [f"one recorded step of {found['seconds'] * 1e3:.1f} ms:"]
    for lane, values in found["lanes"].items():
        lines.append(f"  {lane:<10}{values['busy_seconds'] * 1e3:>12.1f} ms{values['share']:>8.0%}")
    lines.append(f"  {found['hidden']:.0%} of what the other lanes do passes while the compute lane works")
    moved = {name.replace("_", " "): f"{size / 1e9:.3f} GB" for name, size in found["moved"].items()}
    lines.append("  moved: " + ", ".join(f"{size} {name}" for name, size in moved.items()))
    return lines
