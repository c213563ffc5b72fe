"""Charts of the page: positions of lines, ticks and marks, which `report.html.jinja` turns into HTML.

Positions run from 0 to 1000 in both directions, from the upper left. The page stretches them to its width, so
that text and dots keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from horizon_lm.schedule.ops import Lane

SIZE = 1000.0
_MOST_POINTS, _MOST_DOTS, _MOST_HINTS = 900, 500, 200
_WIDE = 50.0  # ratio of largest to smallest value above which an axis is logarithmic

Value = float | None


@dataclass(frozen=True)
class Series:
    """A line of a chart. name: in the legend; kind: CSS class; ys: None leaves a gap; dots: mark points."""

    name: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[Value]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at x (a vertical line), or with kind `level` a reference value (a horizontal line)."""

    name: str
    kind: str
    at: float
    title: str = ""


@dataclass
class Chart:
    """A drawn chart.

    y_ticks: (label, top in %); x_ticks: (label, label below, left in %)
    paths: (kind, d of an SVG path); dots: (kind, x, y, title)
    levels, marks: (kind, position, title); hints: (x, width, title)
    legend: (kind, name, has dots); label: the chart in a sentence
    """

    title: str
    unit: str
    is_log: bool = False
    label: str = ""
    y_ticks: list[tuple[str, float]] = field(default_factory=list)
    x_ticks: list[tuple[str, str, float]] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    dots: list[tuple[str, float, float, str]] = field(default_factory=list)
    levels: list[tuple[str, float, str]] = field(default_factory=list)
    marks: list[tuple[str, float, str]] = field(default_factory=list)
    hints: list[tuple[float, float, str]] = field(default_factory=list)
    legend: list[tuple[str, str, bool]] = field(default_factory=list)


def draw(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    below: Callable[[float], str] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """Draw `series` over steps; None if no value is finite. below: gives a step's second label."""
    levels, marks = ([m for m in marks if (m.kind == "level") == along] for along in (True, False))
    series = [s for s in series if any(y is not None for y in s.ys)]
    if not series:
        return None
    values = [y for s in series for y in s.ys if y is not None] + [level.at for level in levels]
    low, high = min(values), max(values)
    is_log = not from_zero and low > 0 and high / low > _WIDE
    y_place, y_ticks = _y_axis(0.0 if from_zero else low, high, is_log)
    steps = [x for s in series for x in s.xs] + [mark.at for mark in marks]
    first, last = min(steps), max(steps)
    first, last = (first, last) if last > first else (first - 0.5, last + 0.5)

    def x_place(x: float) -> float:
        return SIZE * (x - first) / (last - first)

    chart = Chart(title, unit, is_log=is_log, label=_sentence(title, unit, series))
    chart.y_ticks = [(_number(y), y_place(y) / SIZE * 100) for y in y_ticks]
    ticks = MaxNLocator(nbins=7, integer=True).tick_values(first, last)
    chart.x_ticks = [
        (f"{x:,.0f}", below(x) if below else "", x_place(x) / SIZE * 100)
        for x in ticks
        if first <= x <= last and x == round(x)
    ]
    for one in series:
        points = thin(one.xs, one.ys, _MOST_DOTS if one.dots else _MOST_POINTS)
        chart.paths.append((one.kind, _path(points, x_place, y_place)))
        lone = len([y for y in one.ys if y is not None]) == 1
        if one.dots or lone:
            chart.dots += [
                (one.kind, round(x_place(x), 1), round(y_place(y), 1), f"step {x:,.0f}: {one.name} {y:,.5g}")
                for x, y in points
                if y is not None
            ]
        chart.legend.append((one.kind, one.name, one.dots or lone))
    for level in levels:
        chart.levels.append((level.kind, round(y_place(level.at), 1), level.title or level.name))
    for mark in marks:
        chart.marks.append((mark.kind, round(x_place(mark.at), 1), mark.title or mark.name))
    chart.legend += list({(m.kind, m.name, False): None for m in (*levels, *marks)})
    chart.hints = _hints(series, x_place)
    return chart


def thin(xs: Sequence[float], ys: Sequence[Value], most: int) -> list[tuple[float, Value]]:
    """Thin a line to about `most` points that look the same: minimum and maximum of each stretch."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), most // 2):
        finite = [int(i) for i in part if ys[i] is not None]
        if not finite:
            kept.add(int(part[0]))
            continue
        kept.add(min(finite, key=lambda i: ys[i]))  # type: ignore[arg-type, return-value]
        kept.add(max(finite, key=lambda i: ys[i]))  # type: ignore[arg-type, return-value]
    return [points[i] for i in sorted(kept)]


def _y_axis(low: float, high: float, is_log: bool) -> tuple[Callable[[float], float], list[float]]:
    """Return the function from a value to its position, and the values of the ticks."""
    if is_log:
        bottom, top = math.log10(low) - 0.05, math.log10(high) + 0.05
        decades = top - bottom
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        ticks = LogLocator(subs=subs, numticks=7).tick_values(low, high)
        shown = [float(t) for t in ticks if bottom <= math.log10(t) <= top]
        return lambda y: SIZE * (top - math.log10(y)) / (top - bottom), shown
    if high == low:
        pad = abs(high) * 0.05 or 1.0
        low, high = (low - pad if low else 0.0), high + pad
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    spread = high - low
    bottom, top = (0.0 if low == 0 else low - 0.04 * spread), high + 0.06 * spread
    shown = [float(t) for t in ticks if bottom <= t <= top]
    return lambda y: SIZE * (top - y) / (top - bottom), shown


def _path(
    points: Sequence[tuple[float, Value]],
    x_place: Callable[[float], float],
    y_place: Callable[[float], float],
) -> str:
    parts, open_ = [], False
    for x, y in points:
        if y is not None:
            parts.append(f"{'L' if open_ else 'M'}{x_place(x):.1f} {y_place(y):.1f}")
        open_ = y is not None
    return "".join(parts)


def _hints(series: Sequence[Series], x_place: Callable[[float], float]) -> list[tuple[float, float, str]]:
    """Return columns whose tooltips give the values of a step."""
    steps = sorted({x for s in series for x in s.xs})
    if len(steps) > _MOST_HINTS:
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, _MOST_HINTS)]
    tables = [(s.name, dict(zip(s.xs, s.ys, strict=True))) for s in series]
    centres = [x_place(x) for x in steps]
    edges = [0.0, *((a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)), SIZE]
    found = []
    for x, left, right in zip(steps, edges, edges[1:], strict=False):
        said = [f"{name} {value:,.5g}" for name, table in tables if (value := table.get(x)) is not None]
        found.append(
            (round(left, 1), round(right - left, 1), f"step {x:,.0f}: {', '.join(said) or 'not finite'}")
        )
    return found


def _sentence(title: str, unit: str, series: Sequence[Series]) -> str:
    """Describe the chart for screen readers."""
    parts = []
    for one in series:
        points = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None]
        (first, start), (last, end) = points[0], points[-1]
        parts.append(f"{one.name} {start:,.4g} at step {first:,.0f}, {end:,.4g} at step {last:,.0f}")
    return f"{title} ({unit}) by step: {'; '.join(parts)}"


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


def short(count: float) -> str:
    """Format 1,234,567 as 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


Box = tuple[str, float, float, str]


def lane_boxes(spans: Sequence[tuple[str, str, float, float]], most: int = 700) -> dict[str, list[Box]]:
    """Return each lane's ops in a recorded step as (kind of op, x, width, title), from 0 to 1000.

    spans: (op, lane, start, end) in seconds. In a lane with more than `most` ops, those too narrow to tell
    apart share a box.
    """
    begin, end = min(s[2] for s in spans), max(s[3] for s in spans)
    scale = SIZE / ((end - begin) or 1.0)
    found: dict[str, list[Box]] = {}
    for lane in (str(lane) for lane in Lane if any(s[1] == lane for s in spans)):
        mine = sorted((s[2], s[3], s[0]) for s in spans if s[1] == lane)
        boxes: list[Box] = []
        for start, stop, name in mine:
            x, width = (start - begin) * scale, (stop - start) * scale
            if len(mine) > most and boxes and x + width - boxes[-1][1] < SIZE / most:
                kind, left, _, title = boxes[-1]
                boxes[-1] = (kind, left, x + width - left, title.removesuffix(" ...") + " ...")
            else:
                boxes.append((name[:1], x, width, f"{name} {(stop - start) * 1e3:,.3f} ms"))
        found[lane] = [(k, round(x, 2), max(1.5, round(width, 2)), title) for k, x, width, title in boxes]
    return found


def tokens_at(steps: Sequence[float], tokens: Sequence[float]) -> Callable[[float], str]:
    """Return a function that labels a step with the tokens seen by then, interpolated between records."""
    xs, ys = [0.0, *steps], [0.0, *tokens]
    return lambda step: short(float(np.interp(step, xs, ys)))
