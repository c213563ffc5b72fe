"""Goals on the GPU machine: results, limiting lanes and simulated remedies."""

from __future__ import annotations

from collections.abc import Iterable

from horizon_lm.bench.figures import Row
from horizon_lm.bench.protocol import Case

from . import remedies
from .gpu_parts import group_of
from .report import Report

HEAD = ["goal", "wanted", "found", "reached", "busiest lane"]


def _find(rows: Iterable[Row], group: str, name: str) -> Row | None:
    fits = (r for r in rows if r["group"] == group and r["name"] == name and r.get("status") == "done")
    return next(fits, None)


def _rate(row: Row | None) -> float | None:
    return row["tokens_per_second"][0] if row else None


def _ratio(one: Row | None, two: Row | None) -> float | None:
    a, b = _rate(one), _rate(two)
    return a / b if a and b else None


def lane_of(row: Row | None) -> str:
    """Return the lane that was busy longest in the recorded step, and for how much of it."""
    lanes = (row or {}).get("breakdown", {}).get("lanes", {})
    if not lanes:
        return ""
    name = max(lanes, key=lambda lane: lanes[lane]["busy_seconds"])
    return f"{name} ({lanes[name]['share']:.0%})"


def goals(rows: list[Row], peak: float) -> list[list[str]]:
    """Return a row for each goal; `not measured` if a run is missing."""
    found: list[tuple[str, float, float | None, Row | None]] = []
    for sequences in (16, 64):
        group = group_of("qwen3-4b", sequences)
        ours = _find(rows, group, "ours")
        practical = _ratio(ours, _find(rows, group, "torch"))
        found.append((f"speed / in-memory of Qwen3-4B at {sequences}k tokens", 0.98, practical, ours))
        without = _ratio(ours, _find(rows, group, "ours, streamed"))
        found.append((f"the same / without residents and rounds, {sequences}k", 1.0, without, ours))
    ours = _find(rows, group_of("qwen2.5-7b", 512), "ours")
    useful = ours["model_flops"] / ours["hardware_flops"] if ours else None
    found.append(("model / hardware FLOPs of Qwen2.5-7B at 512k tokens", 6 / 6.3, useful, ours))
    group = "qwen3-4b, peers, 16 x 1024, clip 1.0"
    ours = _find(rows, group, "ours")
    found.append(
        ("times ZeRO-3 full offload, Qwen3-4B", 3.0, _ratio(ours, _find(rows, group, "zero3-offload")), ours)
    )
    ours = _find(rows, "qwen2.5-7b, 148 x 1024", "ours")
    found.append(("tokens/s of Qwen2.5-7B at 148 x 1024", 8650.0, _rate(ours), ours))
    mfu = ours["model_flops"] * ours["tokens_per_second"][0] / _tokens(ours) / peak if ours else None
    found.append(("MFU of the same", 0.40, mfu, ours))
    group = "qwen3-4b, clipping, 16k tokens"
    ours = _find(rows, group, "ours")
    kept = _ratio(ours, _find(rows, group, "ours, clip off, deferred"))
    found.append(("speed with clipping over without, same update mode", 0.98, kept, ours))
    kept = _ratio(ours, _find(rows, group, "ours, clip off"))
    found.append(("speed with clipping over without, best mode", 0.98, kept, ours))
    for wanted, more, where in ((20.0, ", pooled", "and device memory"), (10.0, "", "memory alone")):
        large = _find(rows, "largest", f"ours, exact, clip 1.0{more}")
        billions = large["parameters"] / 1e9 if large else None
        found.append((f"B parameters, exact AdamW, clip 1.0, host {where}", wanted, billions, large))
    return [_cells(*row) for row in found]


def _tokens(row: Row) -> int:
    return int(row["case"]["sequences"]) * int(row["case"]["length"])


def _cells(goal: str, wanted: float, value: float | None, row: Row | None) -> list[str]:
    if value is None:
        return [goal, f"{wanted:,g}", "not measured", "", ""]
    short = f"no, {1 - value / wanted:.1%} short"
    return [goal, f"{wanted:,g}", f"{value:,.4g}", "yes" if value >= wanted else short, lane_of(row)]


def add_goals(report: Report, rows: list[Row], peak: float, *, simulate: bool = True) -> None:
    """Add the goals and, with `simulate`, remedies for each of our runs that missed one, on this machine."""
    report.section("Goals")
    report.table(HEAD, goals(rows, peak))
    groups = [group_of("qwen3-4b", sequences) for sequences in (16, 64)]
    runs = [run for g in [*groups, "qwen2.5-7b, 148 x 1024"] if (run := _find(rows, g, "ours"))]
    if runs and simulate:
        found = [cells for run in runs for cells in remedies.rows(run["group"], Case.from_json(run["case"]))]
        report.table(
            remedies.HEAD, found, note="Simulated with the profile named; see benchmarks/remedies.py."
        )
