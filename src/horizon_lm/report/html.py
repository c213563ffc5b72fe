"""A run as one HTML page that needs nothing else: `horizon report RUN`.

`history` reads metrics.jsonl, `figures` and `charts` turn it into tables and drawings, the template
`report.html.jinja` into a page. Whatever the run's files say is escaped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from horizon_lm.checkpoint.folder import RunFolder, writing
from horizon_lm.io import files
from horizon_lm.report import figures
from horizon_lm.report.charts import lane_boxes
from horizon_lm.report.display import number
from horizon_lm.report.history import History, Line
from horizon_lm.report.metrics import mean_of_tail
from horizon_lm.schedule.draw import MEANING, Span, chrome_trace, utilisation
from horizon_lm.schedule.ops import Op, parse_op


@dataclass(frozen=True)
class Report:
    """written: the files. text: how the run stands, in lines for the terminal."""

    written: list[Path]
    text: str


def write_report(run: Path) -> Report:
    """Write report.html, and trace.json where a step was recorded, into the run's folder; also while it runs.

    Raises DataError for a folder without a run, DoesNotFitError and ConfigError where it cannot be written.
    """
    folder = RunFolder(run.expanduser())
    history = History.read(folder)
    texts = {folder.report: render(folder, history)}
    if history.timeline and history.timeline["spans"]:
        texts[folder.trace] = json.dumps(chrome_trace(_ops(history.timeline)))
    for path, text in texts.items():
        with writing(path):
            files.write_file(path, text)
    return Report(list(texts), _in_words(folder, history))


def render(folder: RunFolder, history: History) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=_name(folder, history),
        state=history.state,
        resume=_resume(folder, history),
        timeline=_timeline(history),
        kinds=list(MEANING),
        **figures.head(history),
        **figures.curves(history),
        **figures.memory(history),
        **figures.lanes(history),
        **figures.tables(history, folder),
    )


def _name(folder: RunFolder, history: History) -> str:
    return str(history.header.get("run_name") or folder.path.resolve().name)


def _resume(folder: RunFolder, history: History) -> str | None:
    """The command that goes on with a run that was stopped."""
    is_over = history.state.kind in ("stopped", "failed")
    return f"horizon resume {folder.path}" if is_over and folder.has_checkpoints else None


def _in_words(folder: RunFolder, history: History) -> str:
    state = history.state
    lines = [f"{_name(folder, history)}: {state.title}", *state.why.splitlines()[:1]]
    losses = [f"loss {number(mean_of_tail(history.steps))} (mean of the last tenth)"]
    held_out = [e for e in history.evaluations if e.get("eval_loss") is not None]
    if held_out:
        best = min(held_out, key=lambda e: e["eval_loss"])
        last = held_out[-1]
        losses.append(f"held-out loss {number(last['eval_loss'])} after step {last['step']:,}")
        if best is not last:
            losses.append(f"the best was {number(best['eval_loss'])} after step {best['step']:,}")
    lines.append(", ".join(losses))
    resume = _resume(folder, history)
    return "\n  ".join([*lines, *([f"to go on: {resume}"] if resume else [])])


def _timeline(history: History) -> Line | None:
    """The recorded step, drawn."""
    line = history.timeline
    if line is None or not line["spans"]:
        return None
    spans = [(str(name), str(lane), float(start), float(end)) for name, lane, start, end in line["spans"]]
    used = {name[:1] for name, *_ in spans}
    seconds = max(s[3] for s in spans) - min(s[2] for s in spans)
    return {
        "step": line["step"],
        "length": figures.duration(seconds),
        "kinds": [(kind, meaning) for kind, meaning in MEANING.items() if kind in used],
        "rows": list(lane_boxes(spans).items()),
        "shares": {lane: f"{row['share']:.0%}" for lane, row in utilisation(_ops(line)).items()},
    }


def _ops(timeline: dict[str, Any]) -> list[Span]:
    return [(Op(*parse_op(name)), start, end) for name, _, start, end in timeline["spans"]]
