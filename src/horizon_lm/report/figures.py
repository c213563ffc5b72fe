"""The figures of a run's page: what stands in its tiles, charts and tables. Plain values for the template."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import grouped_keys
from horizon_lm.report.charts import Chart, Mark, Series, draw, short, tokens_at
from horizon_lm.report.display import clock, number, rate
from horizon_lm.report.history import History, Line
from horizon_lm.report.metrics import mean_of_tail
from horizon_lm.report.plot import smoothed
from horizon_lm.schedule.ops import Lane
from horizon_lm.words import count, parameters, size

_MOST_ROWS, _MOST_NOTES = 60, 50
_SMOOTHED_FROM = 40  # records; fewer are as clear as their mean


def head(history: History) -> dict[str, Any]:
    """Subtitle and tiles."""
    header, last = history.header, history.steps[-1]
    parts = [str(header.get("model_type") or "model")]
    if header.get("num_parameters"):
        parts.append(parameters(header["num_parameters"]))
    if history.settings.get("dtype"):
        parts.append(str(history.settings["dtype"]))
    parts.append(f"on {header.get('device', 'an unknown device')}")
    tiles = [*_loss_tiles(history)]
    total = header.get("num_steps")
    epoch = f"epoch {last['epoch']:.2f}" if last.get("epoch") is not None else ""
    tiles.append(("Steps", f"{history.sessions[-1].step:,}", f"of {total:,}, {epoch}" if total else epoch))
    if last.get("num_tokens"):
        targets = last.get("num_target_tokens")
        tiles.append(("Tokens", short(last["num_tokens"]), f"{short(targets)} trained on" if targets else ""))
    if last.get("seconds"):
        tiles.append(
            ("Time in steps", clock(last["seconds"]), f"up to {moment(history.sessions[-1].last_seen)}")
        )
    speed = _column(history.steps[1:] or history.steps, "tokens_per_second")
    if speed:
        mfu = _column(history.steps[1:] or history.steps, "mfu")
        tiles.append(
            (
                "Tokens a second",
                rate(statistics.median(speed)),
                f"median; mfu {statistics.median(mfu):.0%}" if mfu else "median",
            )
        )
    memory_ = _column(history.steps, "host_rss_bytes")
    if memory_:
        device = max(_column(history.steps, "device_bytes"), default=0)
        tiles.append(
            ("Host memory", size(max(memory_)), f"peak; device {size(device)}" if device else "peak")
        )
    return {"subtitle": ", ".join(parts), "tiles": tiles, "last_seen": moment(history.sessions[-1].last_seen)}


def _loss_tiles(history: History) -> list[tuple[str, str, str]]:
    tiles = [("Training loss", number(mean_of_tail(history.steps)), "mean of the last tenth")]
    held_out = [e for e in history.evaluations if e.get("eval_loss") is not None]
    if held_out:
        best = min(held_out, key=lambda e: e["eval_loss"])
        last = held_out[-1]
        small = f"after step {last['step']:,}"
        if best is not last:
            small += f"; best {number(best['eval_loss'])} after {best['step']:,}"
        tiles.insert(0, ("Held-out loss", number(last["eval_loss"]), small))
    return tiles


def curves(history: History) -> dict[str, Any]:
    """Charts over steps, and the held-out losses in numbers."""
    steps, xs = history.steps, [line["step"] for line in history.steps]
    losses = [line.get("loss") for line in steps]
    series = [Series("training", "train", xs, losses)]
    if len(xs) >= _SMOOTHED_FROM:
        smooth = [
            None if math.isnan(y) else y for y in smoothed([math.nan if y is None else y for y in losses])
        ]
        series = [
            Series("training", "raw", xs, losses),
            Series("training, smoothed", "train", xs, smooth),
        ]
    held_out = history.evaluations
    series.append(
        Series(
            "held-out",
            "held",
            [e["step"] for e in held_out],
            [e.get("eval_loss") for e in held_out],
            dots=True,
        )
    )
    tokens = _below(history)
    limit = history.settings.get("max_grad_norm") or math.inf
    has_limit = 0 < limit < math.inf
    levels = [Mark("clipped above", "level", limit, f"clipped above {limit:g}")] if has_limit else []
    charts = [
        _line(history, "Learning rate", "of each update", "learning_rate", "rate", from_zero=True),
        _line(history, "Gradient norm", "before clipping", "grad_norm", "rate", levels=levels),
        _line(
            history,
            "Speed",
            "tokens a second",
            "tokens_per_second",
            "train",
            levels=_promise(history, "tokens_per_second"),
            from_zero=True,
        ),
    ]
    remarks = []
    norms = _column(steps, "grad_norm")
    if has_limit and norms:
        clipped = sum(norm > limit for norm in norms)
        remarks.append(
            f"Gradients longer than max_grad_norm = {limit:g} are scaled down to it: "
            f"{clipped:,} of {len(norms):,} recorded steps ({clipped / len(norms):.0%})."
        )
    return {
        "loss": draw("Loss", "nats per token", series, marks=_marks(history), below=tokens),
        "charts": [chart for chart in charts if chart],
        "remarks": remarks,
        "evaluations": [_evaluation(e) for e in held_out[-500:]],
    }


def _evaluation(line: Line) -> Line:
    perplexity, tokens, seconds = (line.get(f"eval_{key}") for key in ("perplexity", "tokens", "seconds"))
    return {
        "step": f"{line['step']:,}",
        "loss": _or_dash(line.get("eval_loss"), number),
        "perplexity": _or_dash(perplexity, "{:,.1f}".format),
        "tokens": _or_dash(tokens, "{:,}".format),
        "seconds": _or_dash(seconds, "{:.1f}".format),
    }


def _line(
    history: History,
    title: str,
    unit: str,
    key: str,
    kind: str,
    *,
    scale: float = 1.0,
    levels: Sequence[Mark] = (),
    from_zero: bool = False,
) -> Chart | None:
    """One number of the records over steps."""
    ys = [None if line.get(key) is None else line[key] / scale for line in history.steps]
    xs = [line["step"] for line in history.steps]
    name = "measured" if levels and key != "grad_norm" else title.lower()
    return draw(
        title,
        unit,
        [Series(name, kind, xs, ys)],
        levels=levels,
        below=_below(history),
        from_zero=from_zero,
    )


def _promise(history: History, key: str, scale: float = 1.0) -> list[Mark]:
    """What the plan said, as a line to compare with."""
    plan = history.header.get("plan") or {}
    value = plan.get(key)
    return [Mark("predicted", "level", value / scale)] if value else []


def _below(history: History) -> Callable[[float], str] | None:
    known = [(s["step"], s["num_tokens"]) for s in history.steps if s.get("num_tokens")]
    return tokens_at(*zip(*known, strict=True)) if known else None


def _marks(history: History) -> list[Mark]:
    """What happened at steps: faults, and where the run was taken up again."""
    last = history.steps[-1]["step"]
    faults = [e for e in history.of("fault") if e["step"] <= last]
    marks = [
        Mark("not finite, or a spike", "fault", e["step"], f"step {e['step']:,}: {e.get('reason', '')}")
        for e in faults[-200:]
    ]
    resumed = [s.resumed_at for s in history.sessions if s.resumed_at]
    return [*marks, *(Mark("resumed", "resumed", step) for step in resumed[-200:])]


def memory(history: History) -> dict[str, Any]:
    """Predicted beside measured; empty rows without a plan."""
    plan, steps = history.header.get("plan"), history.steps
    charts = [
        _line(
            history,
            "Host memory",
            "GB",
            "host_rss_bytes",
            "train",
            scale=1e9,
            levels=_promise(history, "host_total", 1e9),
            from_zero=True,
        )
    ]
    if any(_column(steps, "device_bytes")):
        charts.append(
            _line(
                history,
                "Device memory",
                "GB",
                "device_bytes",
                "train",
                scale=1e9,
                levels=_promise(history, "device_total", 1e9),
                from_zero=True,
            )
        )
    found: dict[str, Any] = {
        "memory_charts": [c for c in charts if c],
        "memory": [],
        "memory_parts": [],
        "hardware": "",
    }
    if not plan:
        return found
    speed = _column(steps[1:] or steps, "tokens_per_second")
    rows = [
        (
            "host memory, GB",
            plan.get("host_total", 0) / 1e9,
            max(_column(steps, "host_rss_bytes"), default=0) / 1e9,
        ),
        (
            "device memory, GB",
            plan.get("device_total", 0) / 1e9,
            max(_column(steps, "device_bytes"), default=0) / 1e9,
        ),
        ("tokens a second", plan.get("tokens_per_second", 0), statistics.median(speed) if speed else 0),
    ]
    found["memory"] = [
        (name, f"{said:,.2f}", f"{was:,.2f}", f"{said / was - 1:+.1%}")
        for name, said, was in rows
        if said and was
    ]
    for place in ("host", "device"):
        parts = sorted((plan.get(f"{place}_bytes") or {}).items(), key=lambda part: -part[1])
        if parts:
            found["memory_parts"].append(
                (
                    f"Predicted parts of {place} memory",
                    [(name.replace("_", " "), size(n)) for name, n in parts],
                )
            )
    hardware = plan.get("hardware") or {}
    found["hardware"] = ", ".join(str(hardware[key]) for key in ("title", "figures") if hardware.get(key))
    return found


def lanes(history: History) -> dict[str, Any]:
    """Mean shares of the steps in which each lane worked."""
    recorded = [line["lanes"] for line in history.steps if line.get("lanes")]
    plan = history.header.get("plan") or {}
    said, whole = plan.get("lane_seconds") or {}, plan.get("step_seconds")
    rows = []
    for lane in (str(lane) for lane in Lane if any(lane in shares for shares in recorded)):
        share = statistics.fmean(shares.get(lane, 0.0) for shares in recorded)
        predicted = f"{said[lane] / whole:.1%}" if lane in said and whole else "–"
        rows.append((lane, round(100 * share, 1), f"{share:.1%}", predicted))
    return {"lanes": rows, "limited_by": plan.get("limited_by", "")}


def tables(history: History, folder: RunFolder) -> dict[str, Any]:
    """Everything in words: warnings, data, checkpoints, settings, machine, sessions."""
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
            loss = _or_dash(line.get("loss"), number)
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
    """Who ended the run before its last step, and which model was exported."""
    found = [f"stopped at step {line['step']:,} by {line.get('by')}" for line in history.of("stopped")]
    for line in history.of("best"):
        value = _or_dash(line.get("value"), number)
        found.append(f"exported: the model of step {line['step']:,}, the best {line.get('metric')} ({value})")
    return found


def _end(line: Line | None, *, is_running: bool) -> str:
    if line is None:
        return "running" if is_running else "killed: no end was recorded"
    why = line.get("reason") or line.get("error")
    return f"{line.get('status')}: {why}" if why else str(line.get("status"))


def _data(header: Line) -> list[tuple[str, str]]:
    data = header.get("data")
    sequences, length = (_or_dash(header.get(key), "{:,}".format) for key in ("num_sequences", "max_length"))
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
    share = f", {trained:,} of them trained on" if trained < data.get("tokens", 0) else ""
    rows.append((f"tokens {first}", f"{data.get('tokens', 0):,}{share}"))
    for key, what in (
        ("left_out", "longer than max_length, or nothing to train on"),
        ("truncated", "longer than max_length: cut"),
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
        named = ", ".join(map(str, data.get("eval_files") or ())) or "a part of datasets (val_size)"
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
        "seconds": _or_dash(line.get("seconds"), "{:.1f} s".format),
        "size": _or_dash(line.get("bytes") or None, size),
        "outcome": outcome,
        "failed": not name,
    }


def _settings(history: History) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """(title, rows, shown at once): those that the user named, then all others by group."""
    now, first = history.settings, history.sessions[0].header
    began, named = first.get("settings") or {}, first.get("named")
    groups = grouped_keys(TrainConfig)
    order = [key for keys in groups.values() for key in keys]
    order += [key for key in now if key not in order]
    if named is None:
        return [
            (
                "Settings as config.resolved.yaml has them",
                [(k, _value(now[k])) for k in order if k in now],
                False,
            )
        ]
    changed = {k for k in now if k in began and now[k] != began[k]} - {"resume_from_checkpoint"}
    rows = []
    for key in order:
        if key in now and (key in named or key in changed):
            was = f" (was {_value(began[key])} at the beginning)" if key in changed else ""
            rows.append((key, _value(now[key]) + was))
    shown = {key for key, _ in rows}
    found = [("Named by the user", rows, True)]
    for group, keys in groups.items():
        rest = [(key, _value(now[key])) for key in keys if key in now and key not in shown]
        if rest:
            found.append((f"{group}: by default, or chosen", rest, False))
    return found


def _choices(history: History) -> list[tuple[str, str, str]]:
    """What the planner chose, and why. To a session that was resumed all settings are given, so that the
    reasons are those of the first."""
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
        rows.append(("processor", f"{machine.get('cpu')}, {machine.get('cores')} cores may be used"))
        rows.append(("host memory", size(machine.get("host_bytes", 0))))
        rows.append(("system", str(machine.get("platform"))))
    if header.get("num_threads"):
        rows.append(("threads of torch", str(header["num_threads"])))
    if header.get("peak_flops"):
        rows.append(
            ("peak for mfu", f"{header['peak_flops'] / 1e12:,.3g} TFLOP/s, from {header.get('peak_from')}")
        )
    rows += [(str(name), str(version)) for name, version in (header.get("versions") or {}).items()]
    if header.get("commit"):
        rows.append(("commit", str(header["commit"])))
    return rows


def _value(value: Any) -> str:
    """A setting as it is written; of a dataset what is not by default."""
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


def _column(lines: Sequence[Line], key: str) -> list[Any]:
    return [line[key] for line in lines if line.get(key) is not None]


def _or_dash(value: Any, show: Callable[[Any], str]) -> str:
    return "–" if value is None else show(value)


def moment(time: str) -> str:
    """A time of metrics.jsonl for people."""
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return time or "an unknown time"


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"
