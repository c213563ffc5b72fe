"""A run as one HTML page: loss, speed, memory, lanes, and what was predicted beside what was measured."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..schedule.draw import svg_timeline
from .folder import RunFolder, writing
from .metrics import read_notes, read_steps

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } svg { width: 100%; height: auto; display: block }
.note { color: #57606a }
"""


def write_report(run: Path) -> list[Path]:
    """Write report.html, and trace.json where a step was recorded, into the run's folder; returns the paths.

    Raises DataError for a folder without a run.
    """
    folder = RunFolder(run.expanduser())
    header, steps = _read(folder.metrics)
    written = [folder.path / "report.html"]
    trace = _timeline(folder.metrics)
    parts = [
        f"<h1>{html.escape(str(header.get('run_name') or folder.path.resolve().name))}</h1>",
        f"<p>{html.escape(_summary(header, steps))}</p>",
        "<h2>Loss</h2>" + line_chart([s["step"] for s in steps], [s["loss"] for s in steps], "step", "loss"),
        "<h2>Throughput</h2>"
        + line_chart([s["step"] for s in steps], [s["tokens_per_second"] for s in steps], "step", "tokens/s"),
        "<h2>Host memory</h2>"
        + line_chart([s["step"] for s in steps], [s["host_rss_bytes"] / 1e9 for s in steps], "step", "GB"),
        _predicted(header.get("plan"), steps),
        _changes(read_notes(folder.metrics)),
    ]
    if trace:
        parts += ["<h2>A step, as it ran</h2>", _lanes(trace), svg_timeline(_spans(trace))]
        written.append(folder.path / "trace.json")
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            f"<title>{html.escape(folder.path.name)}</title><style>{_STYLE}</style>",
            *parts,
            "</html>\n",
        ]
    )
    with writing(folder.path):
        written[0].write_text(page, encoding="utf-8")
        if trace:
            written[1].write_text(json.dumps(_chrome(trace)), encoding="utf-8")
    return written


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        first = json.loads(path.open(encoding="utf-8").readline() or "{}")
        steps = read_steps(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path.parent} holds no run: {path.name} cannot be read ({error})",
            hint="name the output_dir of a run",
        ) from error
    if not steps:
        raise DataError(f"{path} holds no step", hint="the run ended before its first step")
    return first, steps


def _timeline(path: Path) -> list[list[Any]]:
    """The spans of the step that was recorded; empty when there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith('{"event": "timeline"'):
            try:
                return json.loads(line)["spans"]
            except ValueError:  # the last line of a run that was killed
                return []
    return []


def _summary(header: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    last = steps[-1]
    return (
        f"{header.get('model_type')}, {header.get('num_parameters', 0) / 1e6:,.1f} M parameters on "
        f"{header.get('device')}; {last['step']:,} steps, {last['num_tokens']:,} tokens in "
        f"{last['seconds']:,.1f} s"
    )


def _predicted(plan: dict[str, Any] | None, steps: Sequence[dict[str, Any]]) -> str:
    if plan is None:
        return "<p class='note'>The run had no plan.</p>"
    speed = [s["tokens_per_second"] for s in steps[1:] or steps]
    rows = [
        ("host memory, GB", plan["host_total"] / 1e9, max(s["host_rss_bytes"] for s in steps) / 1e9),
        ("tokens/s", plan["tokens_per_second"], statistics.median(speed)),
    ]
    if plan["device_bytes"]:
        rows.append(
            ("device memory, GB", plan["device_total"] / 1e9, max(s["device_bytes"] for s in steps) / 1e9)
        )
    cells = "".join(
        f"<tr><td>{name}</td><td>{said:,.2f}</td><td>{was:,.2f}</td><td>{said / was - 1:+.1%}</td></tr>"
        for name, said, was in rows
        if was
    )
    figures = html.escape(f"{plan['hardware']['title']}, {plan['hardware']['figures']}")
    choices = "".join(
        f"<li>{html.escape(str(c['key']))} = {html.escape(str(c['value']))}: {html.escape(c['reason'])}</li>"
        for c in plan["choices"]
    )
    return (
        "<h2>Predicted beside measured</h2>"
        "<table><tr><th></th><th>predicted</th><th>measured</th><th></th></tr>"
        f"{cells}</table><p class='note'>Rates of {figures}. Memory is sampled at the end of steps, so that "
        f"peaks within a step are not in it.</p><ul>{choices}</ul>"
    )


def _changes(notes: Sequence[dict[str, Any]]) -> str:
    """Settings that did not hold for the whole run."""
    rows = "".join(f"<li>after step {n['step']}: {html.escape(str(n['text']))}</li>" for n in notes)
    return f"<h2>Notes</h2><ul>{rows}</ul>" if rows else ""


def line_chart(xs: Sequence[float], ys: Sequence[float | None], x_name: str, y_name: str) -> str:
    """A line in SVG; values that are None leave a gap."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    if not points:
        return "<p class='note'>nothing was recorded</p>"
    width, height, left, bottom = 800, 220, 70, 30
    low, high = min(y for _, y in points), max(y for _, y in points)
    spread, first, last = (high - low) or 1.0, points[0][0], points[-1][0]

    def place(x: float, y: float) -> str:
        across = left + (x - first) / ((last - first) or 1) * (width - left - 10)
        return f"{across:.1f},{10 + (high - y) / spread * (height - bottom - 20):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    return (
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{y_name} by {x_name}'>"
        f"<polyline points='{line}' fill='none' stroke='#0969da' stroke-width='1.5'/>"
        f"<text x='4' y='18' font-size='12'>{high:,.4g}</text>"
        f"<text x='4' y='{height - bottom - 6}' font-size='12'>{low:,.4g}</text>"
        f"<text x='{left}' y='{height - 8}' font-size='12'>"
        f"{x_name} {first:g} to {last:g}; {y_name}</text></svg>"
    )


def _spans(trace: list[list[Any]]) -> list[tuple[str, str, float, float]]:
    return [(str(name), str(lane), float(start), float(end)) for name, lane, start, end in trace]


def _lanes(trace: list[list[Any]]) -> str:
    spans = _spans(trace)
    whole = max(end for *_, end in spans) - min(start for _, _, start, _ in spans)
    busy: dict[str, float] = {}
    for _, lane, start, end in spans:
        busy[lane] = busy.get(lane, 0.0) + end - start
    rows = "".join(
        f"<tr><td>{lane}</td><td>{s * 1e3:,.1f} ms</td><td>{s / whole:.1%}</td></tr>"
        for lane, s in busy.items()
    )
    return f"<table><tr><th>lane</th><th>busy</th><th>of the step</th></tr>{rows}</table>"


def _chrome(trace: list[list[Any]]) -> dict[str, Any]:
    from ..schedule.draw import chrome_trace
    from ..schedule.ops import Op, parse_op

    return chrome_trace([(Op(*parse_op(name)), start, end) for name, _, start, end in _spans(trace)])
