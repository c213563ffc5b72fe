"""Measurements on a run's page: tiles, charts, memory and lanes. Plain values for the template."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from horizon_lm.report.charts import Chart, Mark, Series, draw, short, tokens_at
from horizon_lm.report.display import clock, number, rate
from horizon_lm.report.history import History, Line
from horizon_lm.report.metrics import mean_of_tail
from horizon_lm.report.plot import smoothed
from horizon_lm.schedule.ops import Lane
from horizon_lm.words import parameters, size

_SMOOTHED_FROM = 40  # records; shorter curves are clear without a mean


@dataclass(frozen=True)
class _Number:
    """A number of the records that has a chart of its own. promised: key of its prediction in the plan."""

    title: str
    unit: str
    key: str
    kind: str
    promised: str = ""
    scale: float = 1.0
    from_zero: bool = True


_RATE = _Number("Learning rate", "of each update", "learning_rate", "rate")
_NORM = _Number("Gradient norm", "before clipping", "grad_norm", "rate", from_zero=False)
_SPEED = _Number("Speed", "tokens per second", "tokens_per_second", "train", "tokens_per_second")
_HOST = _Number("Host memory", "GB", "host_rss_bytes", "train", "host_total", 1e9)
_DEVICE = _Number("Device memory", "GB", "device_bytes", "train", "device_total", 1e9)


def head(history: History) -> dict[str, Any]:
    """Return subtitle and tiles."""
    header = history.header
    parts = [str(header.get("model_type") or "model")]
    if header.get("num_parameters"):
        parts.append(parameters(header["num_parameters"]))
    if history.settings.get("dtype"):
        parts.append(str(history.settings["dtype"]))
    parts.append(f"on {header.get('device', 'an unknown device')}")
    tiles = [*_loss_tiles(history), *_progress_tiles(history), *_machine_tiles(history)]
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


def _progress_tiles(history: History) -> list[tuple[str, str, str]]:
    last, session = history.steps[-1], history.sessions[-1]
    total = history.header.get("num_steps")
    epoch = f"epoch {last['epoch']:.2f}" if last.get("epoch") is not None else ""
    tiles = [("Steps", f"{session.step:,}", f"of {total:,}, {epoch}" if total else epoch)]
    if last.get("num_tokens"):
        targets = last.get("num_target_tokens")
        tiles.append(("Tokens", short(last["num_tokens"]), f"{short(targets)} trained on" if targets else ""))
    if last.get("seconds"):
        tiles.append(("Time in steps", clock(last["seconds"]), f"up to {moment(session.last_seen)}"))
    return tiles


def _machine_tiles(history: History) -> list[tuple[str, str, str]]:
    tiles = []
    speed, mfu = (_settled(history, key) for key in ("tokens_per_second", "mfu"))
    if speed:
        small = f"median; mfu {statistics.median(mfu):.0%}" if mfu else "median"
        tiles.append(("Tokens per second", rate(statistics.median(speed)), small))
    host, device = (_column(history.steps, key) for key in ("host_rss_bytes", "device_bytes"))
    if host:
        small = f"peak; device {size(max(device))}" if any(device) else "peak"
        tiles.append(("Host memory", size(max(host)), small))
    return tiles


def curves(history: History) -> dict[str, Any]:
    """Return the charts over steps, remarks about them, and the held-out losses as numbers."""
    limit = history.settings.get("max_grad_norm") or math.inf
    has_limit = 0 < limit < math.inf
    clipped = [Mark("clipped above", "level", limit, f"clipped above {limit:g}")] if has_limit else []
    charts = [
        *_preferences(history),
        *(_chart(history, _RATE), _chart(history, _NORM, clipped), _chart(history, _SPEED)),
    ]
    remarks, norms = [], _column(history.steps, "grad_norm")
    if has_limit and norms:
        over = sum(norm > limit for norm in norms)
        remarks.append(
            f"Gradients longer than max_grad_norm = {limit:g} are scaled down to it: "
            f"{over:,} of {len(norms):,} recorded steps ({over / len(norms):.0%})."
        )
    return {
        "loss": draw("Loss", _unit(history), _losses(history), _events(history), below=_below(history)),
        "charts": [chart for chart in charts if chart],
        "remarks": remarks,
        "evaluations": [_evaluation(e) for e in history.evaluations[-500:]],
    }


_KINDS = {"chosen": "train", "rejected": "rate", "margins": "raw", "accuracies": "train"}


def _unit(history: History) -> str:
    return "per sample" if any("rewards/chosen" in line for line in history.steps) else "nats per token"


def _preferences(history: History) -> list[Chart | None]:
    """Draw rewards and their accuracy, of training and of held-out samples."""
    found: list[Chart | None] = []
    for title, unit, names in (
        ("Rewards", "mean per sample", ("chosen", "rejected", "margins")),
        ("Reward accuracy", "share of pairs", ("accuracies",)),
    ):
        series = []
        for name in names:
            for lines, prefix, kind in (
                (history.steps, "", _KINDS[name]),
                (history.evaluations, "eval_", "held"),
            ):
                key = f"{prefix}rewards/{name}"
                if any(line.get(key) is not None for line in lines):
                    what = f"held-out {name}" if prefix else name
                    xs, ys = [line["step"] for line in lines], [line.get(key) for line in lines]
                    series.append(Series(what, kind, xs, ys, dots=bool(prefix)))
        if series:
            found.append(draw(title, unit, series, below=_below(history)))
    return found


def _losses(history: History) -> list[Series]:
    xs, losses = [line["step"] for line in history.steps], [line.get("loss") for line in history.steps]
    if len(xs) >= _SMOOTHED_FROM:
        means = smoothed([math.nan if y is None else y for y in losses])
        smooth = [None if math.isnan(y) else y for y in means]
        series = [Series("training", "raw", xs, losses), Series("training, smoothed", "train", xs, smooth)]
    else:
        series = [Series("training", "train", xs, losses)]
    steps = [e["step"] for e in history.evaluations]
    held_out = [e.get("eval_loss") for e in history.evaluations]
    return [*series, Series("held-out", "held", steps, held_out, dots=True)]


def _evaluation(line: Line) -> Line:
    perplexity, tokens, seconds = (line.get(f"eval_{key}") for key in ("perplexity", "tokens", "seconds"))
    return {
        "step": f"{line['step']:,}",
        "loss": or_dash(line.get("eval_loss"), number),
        "perplexity": or_dash(perplexity, "{:,.1f}".format),
        "tokens": or_dash(tokens, "{:,}".format),
        "seconds": or_dash(seconds, "{:.1f}".format),
    }


def _chart(history: History, what: _Number, marks: Sequence[Mark] = ()) -> Chart | None:
    """Draw one number of the records over steps, with its prediction if the plan has one."""
    promised = (history.header.get("plan") or {}).get(what.promised)
    if promised:
        marks = [*marks, Mark("predicted", "level", promised / what.scale)]
    xs = [line["step"] for line in history.steps]
    ys = [None if line.get(what.key) is None else line[what.key] / what.scale for line in history.steps]
    name = "measured" if promised else what.title.lower()
    series = [Series(name, what.kind, xs, ys)]
    return draw(what.title, what.unit, series, marks, below=_below(history), from_zero=what.from_zero)


def _below(history: History) -> Callable[[float], str] | None:
    known = [(s["step"], s["num_tokens"]) for s in history.steps if s.get("num_tokens")]
    return tokens_at(*zip(*known, strict=True)) if known else None


def _events(history: History) -> list[Mark]:
    """Mark faults, and the steps after which the run was resumed."""
    last = history.steps[-1]["step"]
    faults = [e for e in history.of("fault") if e["step"] <= last]
    marks = [
        Mark("not finite, or a spike", "fault", e["step"], f"step {e['step']:,}: {e.get('reason', '')}")
        for e in faults[-200:]
    ]
    resumed = [s.resumed_at for s in history.sessions if s.resumed_at]
    return [*marks, *(Mark("resumed", "resumed", step) for step in resumed[-200:])]


def memory(history: History) -> dict[str, Any]:
    """Return predicted and measured memory and speed; empty rows without a plan."""
    plan, steps = history.header.get("plan") or {}, history.steps
    charts = [_chart(history, _HOST)]
    if any(_column(steps, "device_bytes")):
        charts.append(_chart(history, _DEVICE))
    speed = _settled(history, "tokens_per_second")
    rows = [
        (
            f"{what.title.lower()}, {what.unit}",
            plan.get(what.promised, 0) / what.scale,
            max(_column(steps, what.key), default=0) / what.scale,
        )
        for what in (_HOST, _DEVICE)
    ]
    rows.append(
        ("tokens per second", plan.get("tokens_per_second") or 0, statistics.median(speed) if speed else 0)
    )
    parts = {place: _parts(plan.get(f"{place}_bytes")) for place in ("host", "device")}
    hardware = plan.get("hardware") or {}
    return {
        "memory_charts": [chart for chart in charts if chart],
        "memory": [
            (name, f"{said:,.2f}", f"{was:,.2f}", f"{said / was - 1:+.1%}")
            for name, said, was in rows
            if said and was
        ],
        "memory_parts": [
            (f"Predicted {place} memory by part", found) for place, found in parts.items() if found
        ],
        "hardware": ", ".join(str(hardware[key]) for key in ("title", "figures") if hardware.get(key)),
    }


def _parts(sizes: dict[str, float] | None) -> list[tuple[str, str]]:
    parts = sorted((sizes or {}).items(), key=lambda part: -part[1])
    return [(name.replace("_", " "), size(n)) for name, n in parts]


def lanes(history: History) -> dict[str, Any]:
    """Return each lane's mean busy share of the recorded steps, and the predicted one."""
    recorded = [line["lanes"] for line in history.steps if line.get("lanes")]
    plan = history.header.get("plan") or {}
    said, whole = plan.get("lane_seconds") or {}, plan.get("step_seconds")
    rows = []
    for lane in (str(lane) for lane in Lane if any(lane in shares for shares in recorded)):
        share = statistics.fmean(shares.get(lane, 0.0) for shares in recorded)
        predicted = f"{said[lane] / whole:.1%}" if lane in said and whole else "–"
        rows.append((lane, round(100 * share, 1), f"{share:.1%}", predicted))
    return {"lanes": rows, "limited_by": plan.get("limited_by", "")}


def ranks(history: History) -> dict[str, Any]:
    """Return the table of a run on several ranks: means over the records, and the slowest rank in words."""
    world = (history.steps[-1].get("ranks") or {}).get("world", 1)
    lines = [line["ranks"] for line in history.steps[1:] or history.steps if line.get("ranks")]
    lines = [line for line in lines if line["world"] == world]
    if not lines:
        return {"ranks": [], "about_ranks": []}
    rows = []
    for rank in range(world):
        network, waiting, host = (
            [line[key][rank] for line in lines if len(line.get(key, ())) > rank]
            for key in ("network_seconds", "waiting_seconds", "host_rss_bytes")
        )
        rows.append((rank, _mean(network), _mean(waiting), size(max(host)) if host else "–"))
    return {"ranks": rows, "about_ranks": _about_ranks(lines)}


def _about_ranks(lines: Sequence[Line]) -> list[str]:
    slow = [(line["slowest"], line.get("slowest_lane")) for line in lines if line.get("slowest") is not None]
    sent = [line["bytes_sent"] for line in lines if line.get("bytes_sent")]
    found = []
    if slow:
        (rank, lane), times = Counter(slow).most_common(1)[0]
        found.append(
            f"Others waited most for rank {rank}{f', busiest on the lane {lane}' if lane else ''}: "
            f"in {times / len(slow):.0%} of the recorded steps."
        )
    if sent:
        found.append(f"A rank sent up to {size(statistics.fmean(sent))} per step.")
    return found


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else "–"


def _column(lines: Sequence[Line], key: str) -> list[Any]:
    return [line[key] for line in lines if line.get(key) is not None]


def _settled(history: History, key: str) -> list[Any]:
    """Return a number of the records without the first one, which includes the warm-up."""
    return _column(history.steps[1:] or history.steps, key)


def or_dash(value: Any, show: Callable[[Any], str]) -> str:
    return "–" if value is None else show(value)


def moment(time: str) -> str:
    """Format a time of metrics.jsonl."""
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return time or "an unknown time"
