"""Timelines: a Chrome/Perfetto trace, and a table for the terminal.

Spans are (op, start, end) in seconds, measured (`HostModel.timeline`) or simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from horizon_lm.schedule.ops import Lane, Op

Span = tuple[Op, float, float]
MEANING = {
    "U": "upload weights",
    "J": "gather weights from all ranks",
    "Q": "unpack weights",
    "F": "forward",
    "X": "spill a layer's input",
    "L": "loss",
    "E": "evaluate",
    "R": "restore a layer's input",
    "C": "recompute",
    "B": "backward",
    "T": "add up gradients of all ranks",
    "V": "add up gradients of embedding rows",
    "P": "park gradients between rounds",
    "S": "add gradients of a micro-batch",
    "G": "get gradients back",
    "D": "download gradients",
    "N": "gradient norm",
    "O": "optimizer",
    "A": "optimizer on the device",
    "W": "write a checkpoint",
}
_COLUMNS = 48
_NAME = max(map(len, Lane)) + 2


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """Convert spans to trace events for ui.perfetto.dev and chrome://tracing, one row per lane.

    Returns a dictionary for `json.dump`, with times in microseconds.
    """
    spans = list(spans)
    rows = {lane: row for row, lane in enumerate(Lane)}
    used = sorted({op.lane for op, _, _ in spans}, key=rows.__getitem__)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "training step"}}
    ]
    for lane in used:
        place = {"ph": "M", "pid": 0, "tid": rows[lane]}
        events.append({**place, "name": "thread_name", "args": {"name": str(lane)}})
        events.append({**place, "name": "thread_sort_index", "args": {"sort_index": rows[lane]}})
    for op, start, end in spans:
        names = ("unit", "micro_batch", "slot", "grad_slot", "shard", "grad_shard")
        numbers = {name: getattr(op, name) for name in names}
        events.append(
            {
                "ph": "X",
                "name": str(op),
                "cat": MEANING[op.kind],
                "pid": 0,
                "tid": rows[op.lane],
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {name: number for name, number in numbers.items() if number >= 0},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def busy_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Return the busy seconds of each lane: overlapping spans count once, idle lanes are absent."""
    by_lane: dict[Lane, list[Span]] = {}
    for span in spans:
        by_lane.setdefault(span[0].lane, []).append(span)
    return {
        str(lane): sum(end - start for start, end in _merged(by_lane[lane]))
        for lane in Lane
        if lane in by_lane
    }


def utilisation(spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """Per lane: number of ops, busy seconds, and their share of the time from the first start to the last end
    of all lanes."""
    spans = list(spans)
    whole = _extent(spans)
    total = whole[1] - whole[0]
    counts = Counter(str(op.lane) for op, _, _ in spans)
    return {
        lane: {"ops": counts[lane], "busy_seconds": busy, "share": busy / total if total else 0.0}
        for lane, busy in busy_seconds(spans).items()
    }


def text_timeline(spans: Iterable[Span]) -> str:
    """Draw one line per lane: ops, busy time, share, and when it was busy (`#` most of a column's time, `+`
    some of it, `.` none)."""
    spans = list(spans)
    if not spans:
        return "no spans were recorded"
    begin, end = _extent(spans)
    width = (end - begin) / _COLUMNS
    lines = [f"{'lane':<{_NAME}}{'ops':>6}{'busy':>12}{'share':>8}  0 to {(end - begin) * 1e3:.1f} ms"]
    for name, row in utilisation(spans).items():
        mine = _merged([span for span in spans if str(span[0].lane) == name])
        bar = "".join(_mark(mine, begin + k * width, width) for k in range(_COLUMNS))
        busy = f"{row['busy_seconds'] * 1e3:.1f} ms"
        lines.append(f"{name:<{_NAME}}{row['ops']:>6.0f}{busy:>12}{row['share']:>8.0%}  {bar}")
    return "\n".join(lines)


def _mark(intervals: Sequence[tuple[float, float]], start: float, width: float) -> str:
    busy = sum(max(0.0, min(e, start + width) - max(s, start)) for s, e in intervals)
    return "#" if busy > width / 2 else "+" if busy > 0 else "."


def _extent(spans: Sequence[Span]) -> tuple[float, float]:
    if not spans:
        return 0.0, 0.0
    return min(start for _, start, _ in spans), max(end for _, _, end in spans)


def _merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Intervals in which at least one span runs."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((start, end) for _, start, end in spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
