"""A training step as an SVG timeline: one row per lane, or one per unit.

Rows of lanes show what runs at the same time. Rows of units show the order: forward leads down the model,
backward up again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from horizon_lm.report import svg
from horizon_lm.report.svg import MARGIN, WIDTH, Canvas, Caption
from horizon_lm.schedule.draw import MEANING, Span, utilisation
from horizon_lm.schedule.ops import Lane

KINDS = "".join(MEANING)
ROWS = ("auto", "lanes", "units")
LEFT = 150.0  # of the plot
RIGHT = WIDTH - MARGIN
_LEAST = 1.5  # width of the narrowest box
_ROUND = 6.0  # boxes from this width on have rounded corners
_NAMED = 16.0  # height of a name in rows of units
_LANE_HEIGHT, _LANE_GAP = 36.0, 10.0


@dataclass(frozen=True)
class Box:
    """A box of a row, in units of the drawing.

    kind: of its op, or of the longest of the ops that share it. label: the op, drawn if it fits; "" if
    several share the box.
    """

    kind: str
    x: float
    width: float
    top: float
    height: float
    label: str = ""


@dataclass(frozen=True)
class Row:
    """A row, in units of the drawing. note: the share of time in which it is busy."""

    name: str
    top: float
    height: float
    boxes: tuple[Box, ...]
    note: str = ""


def draw_step(
    spans: Sequence[Span], caption: Caption, *, theme: str = "auto", rows: str = "auto", until: float = 0.0
) -> str:
    """Return a drawing of a step.

    spans: (op, start, end) in seconds. rows: `lanes`, `units`, or `auto`: units if ops run one at a time, as
    on the CPU. until: end of the time axis in seconds after the first start, to compare drawings; at least
    the last end. Raises ValueError without spans, and for another theme or kind of rows.
    """
    if not spans:
        raise ValueError("no spans; hint: pass those of a recorded or simulated step")
    if rows not in ROWS:
        raise ValueError(f"rows {rows!r}; hint: one of {', '.join(ROWS)}")
    canvas = Canvas()
    top = svg.draw_caption(canvas, caption)
    begin, end = min(s[1] for s in spans), max(s[2] for s in spans)
    seconds = max(end - begin, until) or 1.0
    scale = (RIGHT - LEFT) / seconds
    is_by_unit = rows == "units" or rows == "auto" and one_at_a_time(spans)
    drawn = by_unit(spans, top, scale) if is_by_unit else by_lane(spans, top, scale)
    bottom = drawn[-1].top + drawn[-1].height
    axis = _draw_axis(canvas, seconds, top - 4, bottom + 4, scale)
    for row in drawn:
        _draw_row(canvas, row)
    used = {op.kind for op, _, _ in spans}
    legend = [(kind, meaning) for kind, meaning in MEANING.items() if kind in used]
    height = svg.draw_legend(canvas, axis + 14, legend)
    return svg.document(canvas, height, caption, describe(spans), theme)


def one_at_a_time(spans: Sequence[Span]) -> bool:
    """Return whether no two ops overlap."""
    ordered = sorted((start, end) for _, start, end in spans)
    return all(end <= start for (_, end), (start, _) in pairwise(ordered))


def by_lane(spans: Sequence[Span], top: float, scale: float) -> list[Row]:
    """Return the rows of the lanes in use, in the order of `Lane`."""
    begin, shares = min(s[1] for s in spans), utilisation(spans)
    rows = []
    for lane in (lane for lane in Lane if str(lane) in shares):
        mine = [span for span in spans if span[0].lane is lane]
        boxes = _boxes(mine, (begin, scale), top, _LANE_HEIGHT)
        share = shares[str(lane)]["share"]
        busy = f"{share:.0%} busy" if share >= 0.01 else "< 1% busy"
        rows.append(Row(str(lane).replace("_", " "), top, _LANE_HEIGHT, boxes, busy))
        top += _LANE_HEIGHT + _LANE_GAP
    return rows


def by_unit(spans: Sequence[Span], top: float, scale: float) -> list[Row]:
    """Return a row for each unit, the embedding table first, and one for ops of all units."""
    begin = min(s[1] for s in spans)
    names = unit_names(spans)
    height = min(26.0, max(5.0, 320.0 / len(names)))
    gap = 2.0 if height >= _NAMED else 0.5
    apart = math.ceil(_NAMED / height)
    rows = []
    for number, (unit, name) in enumerate(names.items()):
        mine = [span for span in spans if span[0].unit == unit]
        shown = name if number % apart == 0 else ""
        rows.append(Row(shown, top, height - gap, _boxes(mine, (begin, scale), top, height - gap)))
        top += height
    return rows


def unit_names(spans: Sequence[Span]) -> dict[int, str]:
    """Name the units of a step in the order in which it visits them; -1: ops of all units."""
    units = {op.unit for op, _, _ in spans}
    heads = {op.unit for op, _, _ in spans if op.kind in "LE"}
    head = max(heads, default=max(units) + 1)
    table = sorted(unit for unit in units if unit > head)
    found = dict.fromkeys(table, "embedding")
    for unit in sorted(units - set(table)):
        inner = "prologue" if unit == 0 else f"layer {unit - 1}"
        found[unit] = "all units" if unit < 0 else "head" if unit == head else inner
    if -1 in found:
        found[-1] = found.pop(-1)  # last
    return found


def describe(spans: Sequence[Span]) -> str:
    """Describe a step for readers who do not see it."""
    seconds = max(s[2] for s in spans) - min(s[1] for s in spans)
    lanes = (
        f"{lane.replace('_', ' ')} {row['ops']:.0f} ops, busy {row['share']:.0%}"
        for lane, row in utilisation(spans).items()
    )
    return f"A step of {duration(seconds)} on lanes: {'; '.join(lanes)}."


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


# ---- geometry ---------------------------------------------------------------------------------


def _boxes(spans: Sequence[Span], axis: tuple[float, float], top: float, height: float) -> tuple[Box, ...]:
    """Place the ops of a row. axis: (its begin in seconds, units per second)."""
    begin, scale = axis
    found: list[Box] = []
    for cluster in _clusters(sorted(spans, key=lambda span: (span[1], span[2]))):
        tracks = _tracks(cluster)
        part = height / len(tracks)
        for number, track in enumerate(tracks):
            placed = [
                Box(op.kind, LEFT + (s - begin) * scale, (e - s) * scale, top + number * part, part, str(op))
                for op, s, e in track
            ]
            found += _merged(placed)
    return tuple(found)


def _clusters(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans in order of start: those of different groups do not overlap."""
    found: list[list[Span]] = []
    end = -math.inf
    for span in spans:
        if span[1] >= end:
            found.append([])
        found[-1].append(span)
        end = max(end, span[2])
    joined: list[list[Span]] = []  # groups of one span, which need one track, are one
    for alone, groups in groupby(found, key=lambda group: len(group) == 1):
        several = list(groups)
        joined += [[s for group in several for s in group]] if alone else several
    return joined


def _tracks(spans: Sequence[Span]) -> list[list[Span]]:
    """Divide spans in order of start over as few tracks as keep them apart."""
    tracks: list[list[Span]] = []
    for span in spans:
        free = next((track for track in tracks if track[-1][2] <= span[1]), None)
        if free is None:
            tracks.append(free := [])
        free.append(span)
    return tracks


def _merged(boxes: Sequence[Box]) -> list[Box]:
    """Merge boxes narrower than a pixel with their neighbours in the same pixel, so that a row has at most
    two boxes per pixel. Widen the narrowest as far as the next box allows."""
    found: list[Box] = []
    groups = groupby(boxes, key=lambda box: math.floor(box.x) if box.width < 1 else -1)
    for pixel, group in groups:
        if pixel < 0:
            found += group
            continue
        several = list(group)
        most = max(several, key=lambda box: box.width)
        x, end = several[0].x, several[-1].x + several[-1].width
        found.append(Box(most.kind, x, end - x, most.top, most.height))
    nexts = [box.x for box in found[1:]] + [RIGHT]
    ends = [LEFT] + [box.x + box.width for box in found[:-1]]
    return [_widened(box, *room) for box, room in zip(found, zip(ends, nexts, strict=True), strict=True)]


def _widened(box: Box, low: float, high: float) -> Box:
    """Widen a box that is hard to see: to the right, or at the end of the row to the left. low, high: where
    its neighbours end and begin."""
    if box.width >= _LEAST:
        return box
    x = max(low, min(box.x, RIGHT - _LEAST))
    return replace(box, x=x, width=max(box.width, min(_LEAST, high - x)))


# ---- drawing ----------------------------------------------------------------------------------


def _draw_row(canvas: Canvas, row: Row) -> None:
    is_lane = bool(row.note)
    middle = row.top + row.height / 2
    canvas.rect(LEFT, row.top, RIGHT - LEFT, row.height, "track", 3)
    if is_lane:
        canvas.text(MARGIN, middle - 1, row.name, "row")
        canvas.text(MARGIN, middle + 14, row.note, "small", more="soft")
    elif row.name:
        canvas.text(MARGIN, middle + 4.5, row.name, "row")
    paths: dict[str, list[str]] = {}
    for box in row.boxes:
        if box.width >= _ROUND:
            canvas.rect(box.x, box.top, box.width - 0.6, box.height, box.kind, 2)
        else:
            width = svg.num(box.width - 0.5 if box.width > 2 else box.width)
            path = f"M{svg.num(box.x)} {svg.num(box.top)}h{width}v{svg.num(box.height)}h-{width}z"
            paths.setdefault(box.kind, []).append(path)
    for kind, parts in paths.items():
        canvas.raw(f'<path class="{kind}" d="{"".join(parts)}"/>', kind)
    for box in row.boxes:
        words = _fitting(box) if is_lane else _word(box)
        if words:
            x, y = box.x + box.width / 2, box.top + box.height / 2 + 4
            canvas.text(x, y, words, "in", anchor="middle", more=f"on-{box.kind} wide")


def _fitting(box: Box) -> str:
    """Return the op, or at least its unit, if it fits into a box."""
    unit = box.label.lstrip(KINDS).partition(".")[0]
    for words, margin in ((box.label, 9), (unit, 4)):
        if box.height >= 13 and svg.text_width(words, 11) + margin <= box.width:
            return words
    return ""


def _word(box: Box) -> str:
    """Return what the op does, if it fits."""
    words = MEANING[box.kind] if box.label else ""
    return words if box.height >= 13 and svg.text_width(words, 11) + 6 <= box.width else ""


def _draw_axis(canvas: Canvas, seconds: float, top: float, bottom: float, scale: float) -> float:
    """Draw grid lines and times; return the y below them."""
    step = tick_step(seconds)
    unit, factor = ("s", 1.0) if seconds >= 2 else ("ms", 1e3) if seconds >= 2e-3 else ("µs", 1e6)
    digits = max(0, -math.floor(math.log10(step * factor) + 1e-9))
    for k in range(math.floor(seconds / step + 1e-9) + 1):
        x = LEFT + k * step * scale
        canvas.line(x, top, x, bottom)
        anchor = "end" if x > RIGHT - 20 else "middle"
        canvas.text(
            x, bottom + 17, f"{k * step * factor:,.{digits}f} {unit}", "tick", anchor=anchor, more="soft"
        )
    return bottom + 24


def tick_step(seconds: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that gives at most 7 ticks after 0."""
    power = 10.0 ** math.floor(math.log10(seconds / 7))
    return next(step for m in (1, 2, 5, 10) if seconds / (step := m * power) <= 7 + 1e-9)
