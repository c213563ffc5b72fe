"""A run as one self-contained HTML page: `horizon report RUN`.

`history` reads metrics.jsonl, `figures` and `charts` draw its measurements, this module adds the tables in
words, and the template `report.html.jinja` makes the page. Everything from the run's files is escaped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from horizon_lm.checkpoint.folder import RunFolder, writing
from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import grouped_keys
from horizon_lm.io import files
from horizon_lm.report import figures
from horizon_lm.report.charts import lane_boxes
from horizon_lm.report.display import number
from horizon_lm.report.figures import moment, or_dash
from horizon_lm.report.history import History, Line
from horizon_lm.report.metrics import mean_of_tail
from horizon_lm.report.svg import FILLS
from horizon_lm.schedule.draw import MEANING, chrome_trace, utilisation
from horizon_lm.words import count, size

_MOST_ROWS, _MOST_NOTES = 60, 50


@dataclass(frozen=True)
class Report:
    """A written report. written: its files; text: state of the run, for the terminal."""

    written: list[Path]
    text: str


def write_report(run: Path) -> Report:
    """Write report.html, and trace.json if a step was recorded, into the folder of a run, finished or not.

    Raises DataError for a folder without a run, DoesNotFitError or ConfigError if a file cannot be written.
    """
    folder = RunFolder(run.expanduser())
    history = History.read(folder)
    texts = {folder.report: render(folder, history)}
    if history.spans:
        texts[folder.trace] = json.dumps(chrome_trace(history.spans))
    for path, text in texts.items():
        with writing(path):
            files.write_file(path, text)
    return Report(list(texts), _in_words(folder, history))


def render(folder: RunFolder, history: History) -> str:
    """Return the page."""
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
        fills=FILLS,
        **figures.head(history),
        **figures.curves(history),
        **figures.memory(history),
        **figures.lanes(history),
        **figures.ranks(history),
        **tables(history, folder),
    )


def _name(folder: RunFolder, history: History) -> str:
    return str(history.header.get("run_name") or folder.path.resolve().name)


def _resume(folder: RunFolder, history: History) -> str | None:
    """Return the command that resumes a stopped or failed run."""
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
            losses.append(f"best {number(best['eval_loss'])} after step {best['step']:,}")
    lines.append(", ".join(losses))
    resume = _resume(folder, history)
    return "\n  ".join([*lines, *([f"to resume: {resume}"] if resume else [])])


def _timeline(history: History) -> Line | None:
    """Return the recorded step as boxes by lane."""
    line = history.timeline
    if line is None or not line["spans"]:
        return None
    spans = [(str(name), str(lane), float(start), float(end)) for name, lane, start, end in line["spans"]]
    used = {name[:1] for name, *_ in spans}
    seconds = max(s[3] for s in spans) - min(s[2] for s in spans)
    return {
        "step": line["step"],
        "length": _duration(seconds),
        "kinds": [(kind, meaning) for kind, meaning in MEANING.items() if kind in used],
        "rows": list(lane_boxes(spans).items()),
        "shares": {lane: f"{row['share']:.0%}" for lane, row in utilisation(history.spans).items()},
    }


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def tables(history: History, folder: RunFolder) -> dict[str, Any]:
    """Return the tables in words: warnings, data, checkpoints, settings, machine, sessions."""
    header = history.header
    plan = header.get("plan") or {}
    saved = history.of("checkpoint")
    return {
        "warnings": _warnings(history),
        "notes": [
            *map(str, header.get("notes") or ()),
            *map(str, plan.get("notes") or ()),
            *_resumes(history),
            *_ending(history),
        ],
        "data": _data(header),
        "checkpoints": [_checkpoint(line, folder) for line in saved[-_MOST_ROWS:]],
        "checkpoints_left_out": max(0, len(saved) - _MOST_ROWS),
        "settings": _settings(history),
        "choices": _choices(history),
        "machine": _machine(header),
        "sessions": [
            {
                "began": moment(s.began),
                "after": f"{s.resumed_at:,}" if s.resumed_at is not None else "the beginning",
                "step": f"{s.step:,}",
                "end": _end(s.end, is_running=history.is_running and s is history.sessions[-1]),
            }
            for s in history.sessions
        ],
    }


def _warnings(history: History) -> list[str]:
    found = []
    for line in history.events:
        event, step = line.get("event"), line.get("step")
        if event == "fault":
            loss = or_dash(line.get("loss"), number)
            found.append(f"step {step:,} (loss {loss}), {line.get('done')}: {line.get('reason')}")
        elif event == "note":
            found.append(f"step {step:,}: {line.get('text')}")
        elif event == "checkpoint" and line.get("error"):
            found.append(f"no checkpoint of step {step:,}: {line['error']}")
    for line in history.unknown:
        rest = ", ".join(f"{k} {_value(v)}" for k, v in line.items() if k not in ("event", "time"))
        found.append(f"{line.get('event')}: {rest}")
    left = len(found) - _MOST_NOTES
    return found if left <= 0 else [*found[:_MOST_NOTES], f"and {left:,} more in metrics.jsonl"]


def _resumes(history: History) -> list[str]:
    return [
        f"resumed after step {s.resumed_at:,} on {moment(s.began)}"
        for s in history.sessions
        if s.resumed_at is not None
    ]


def _ending(history: History) -> list[str]:
    """Return notes about an early stop and about the exported model."""
    found = [f"stopped at step {line['step']:,} by {line.get('by')}" for line in history.of("stopped")]
    for line in history.of("best"):
        value = or_dash(line.get("value"), number)
        found.append(f"exported the model of step {line['step']:,}: best {line.get('metric')} ({value})")
    return found


def _end(line: Line | None, *, is_running: bool) -> str:
    if line is None:
        return "running" if is_running else "killed: no end recorded"
    why = line.get("reason") or line.get("error")
    return f"{line.get('status')}: {why}" if why else str(line.get("status"))


def _data(header: Line) -> list[tuple[str, str]]:
    data = header.get("data")
    sequences, length = (or_dash(header.get(key), "{:,}".format) for key in ("num_sequences", "max_length"))
    shape = f"{sequences} of {length} tokens"
    if header.get("fill") is not None:
        shape += f", {header['fill']:.1%} full"
    rows = [("sequences", f"{shape} (packing: {header.get('packing', '–')})")]
    if not data:
        return rows
    first = "in the first window of the stream" if data.get("is_stream") else "read"
    for file in data.get("files") or ():
        about = [str(file.get("format") or "format unknown")]
        about += [f"split {file['split']}"] if file.get("split") not in (None, "train") else []
        about += [f"weight {file['weight']:g}"] if file.get("weight") not in (None, 1) else []
        rows.append(("trained on", f"{file.get('path')} ({', '.join(about)})"))
    read = data.get("documents", 0)
    rows.append((f"documents {first}", f"{read:,}"))
    trained = data.get("trained_tokens", 0)
    share = f", {trained:,} trained on" if trained < data.get("tokens", 0) else ""
    rows.append((f"tokens {first}", f"{data.get('tokens', 0):,}{share}"))
    for key, what in (
        ("left_out", "longer than max_length, or without target tokens"),
        ("truncated", "longer than max_length"),
        ("empty", "empty"),
        ("bad", "bad rows"),
    ):
        lost = data.get(key)
        if lost:
            title = "cut" if key == "truncated" else "left out"
            share = f"{lost / max(1, read):.1%} of those read"
            rows.append((title, f"{count(lost, 'document')} ({share}): {what}"))
    rows += [("a bad row", str(text)) for text in data.get("bad_rows") or ()]
    if data.get("eval_sequences"):
        named = ", ".join(map(str, data.get("eval_files") or ())) or "part of datasets (val_size)"
        rows.append(
            (
                "held out",
                f"{named}: {count(data['eval_sequences'], 'sequence')}, "
                f"{count(data.get('eval_tokens', 0), 'token')}",
            )
        )
    else:
        rows.append(("held out", "nothing"))
    return rows


def _checkpoint(line: Line, folder: RunFolder) -> Line:
    name = line.get("name")
    outcome = f"failed: {line.get('error')}"
    if name:
        outcome = str(name) if (folder.path / str(name)).is_dir() else f"{name} (removed)"
    return {
        "step": f"{line['step']:,}",
        "time": moment(str(line.get("time") or "")),
        "seconds": or_dash(line.get("seconds"), "{:.1f} s".format),
        "size": or_dash(line.get("bytes") or None, size),
        "outcome": outcome,
        "failed": not name,
    }


def _settings(history: History) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """Return (title, rows, is open): settings named by the user, then all others by group."""
    now, first = history.settings, history.sessions[0].header
    began, named = first.get("settings") or {}, first.get("named")
    groups = grouped_keys(TrainConfig)
    order = [key for keys in groups.values() for key in keys]
    order += [key for key in now if key not in order]
    if named is None:
        return [
            (
                "Settings in config.resolved.yaml",
                [(k, _value(now[k])) for k in order if k in now],
                False,
            )
        ]
    changed = {k for k in now if k in began and now[k] != began[k]} - {"resume_from_checkpoint"}
    rows = []
    for key in order:
        if key in now and (key in named or key in changed):
            was = f" ({_value(began[key])} at the start)" if key in changed else ""
            rows.append((key, _value(now[key]) + was))
    shown = {key for key, _ in rows}
    found = [("Named by the user", rows, True)]
    for group, keys in groups.items():
        rest = [(key, _value(now[key])) for key in keys if key in now and key not in shown]
        if rest:
            found.append((f"{group}: default or chosen", rest, False))
    return found


def _choices(history: History) -> list[tuple[str, str, str]]:
    """Return the planner's choices with reasons, which only the first session has: a resumed one gets every
    setting from its checkpoint."""
    found = {
        str(c.get("key")): (str(c.get("key")), _value(c.get("value")), str(c.get("reason")))
        for session in history.sessions
        for c in (session.header.get("plan") or {}).get("choices") or ()
        if not c.get("pinned")
    }
    return list(found.values())


def _machine(header: Line) -> list[tuple[str, str]]:
    rows = [("device", str(header.get("device", "–")))]
    machine = header.get("machine") or {}
    if machine:
        rows.append(("processor", f"{machine.get('cpu')}, {machine.get('cores')} usable cores"))
        rows.append(("host memory", size(machine.get("host_bytes", 0))))
        rows.append(("system", str(machine.get("platform"))))
    if header.get("num_threads"):
        rows.append(("torch threads", str(header["num_threads"])))
    if header.get("peak_flops"):
        rows.append(
            ("peak for mfu", f"{header['peak_flops'] / 1e12:,.3g} TFLOP/s ({header.get('peak_from')})")
        )
    rows += [(str(name), str(version)) for name, version in (header.get("versions") or {}).items()]
    if header.get("commit"):
        rows.append(("commit", str(header["commit"])))
    return rows


def _value(value: Any) -> str:
    """Format a setting; of a dataset only what differs from the defaults."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "path" in v for v in value):
        return "; ".join(
            ", ".join(f"{k} {_value(v)}" if k != "path" else str(v) for k, v in _given(entry))
            for entry in value
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _given(dataset: Line) -> list[tuple[str, Any]]:
    fields = DatasetConfig.model_fields
    return [
        (key, value)
        for key, value in dataset.items()
        if value and (key not in fields or value != fields[key].default)
    ]
