"""Progress of a run: a live display on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichBar
from rich.table import Table
from rich.text import Text

from horizon_lm.io.output import raw_stream
from horizon_lm.report.metrics import Metrics
from horizon_lm.report.notebook import Area, below_notebook, in_notebook, progress_html
from horizon_lm.report.records import Evaluation, StepRecord
from horizon_lm.text import shown
from horizon_lm.words import count, size

_PLAIN_SECONDS = 1.0  # least time between plain lines
_RECENT_STEPS = 50
_REDRAWN_SECONDS = 0.25  # least time between two states of a notebook's display


class Progress:
    """A display that shows nothing (`progress: off`) and the base of the others: a context around the run.

    Call `stage` before and after the steps, `start` before the first, `step` after each, with its metrics if
    it is a logging step.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def stage(self, text: str) -> None:
        """Show what is being done before or after the steps."""

    def warn(self, text: str) -> None:
        """Show a warning."""

    def start(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        self._recent.append(record.seconds)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Show an evaluation."""

    def seconds_left(self, step: int) -> float:
        """Estimate the remaining time from the recent steps."""
        return (self.num_steps - step) * sum(self._recent) / max(1, len(self._recent))


class PlainProgress(Progress):
    """A line per logging step, at most about one per second besides those of the first and the last step."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._last_line = -math.inf

    def stage(self, text: str) -> None:
        say(text, self._stream)

    def warn(self, text: str) -> None:
        say(f"warning: {text}", self._stream)

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        super().step(record, metrics)
        if metrics is None:
            return
        now = time.monotonic()
        if now - self._last_line < _PLAIN_SECONDS and metrics.step not in (1, self.num_steps):
            return
        self._last_line = now
        say(self._line(metrics), self._stream)

    def evaluation(self, evaluation: Evaluation) -> None:
        say(evaluation_line(evaluation), self._stream)

    def _line(self, metrics: Metrics) -> str:
        fields = (
            f"step {metrics.step:>{len(str(self.num_steps))}}/{self.num_steps}",
            f"epoch {metrics.epoch:.2f}",
            f"loss {number(metrics.loss)}",
            *_rewards(metrics.preferences),
            f"lr {metrics.learning_rate:.2e}",
            f"grad norm {number(metrics.grad_norm)}",
            f"{rate(metrics.tokens_per_second)} tokens/s{_each(metrics.ranks)}",
            *([f"mfu {metrics.mfu:.0%}"] if math.isfinite(metrics.mfu) else []),
            f"left {clock(self.seconds_left(metrics.step))}",
            f"host {size(metrics.host_rss_bytes)}",
            *([f"device {size(metrics.device_bytes)}"] if metrics.device_bytes else []),
            *([f"slowest {slowest(metrics.ranks)}"] if metrics.ranks else []),
        )
        return "  ".join(fields)


class NotebookProgress(PlainProgress):
    """In Jupyter: a bar, the loss curve and the latest numbers, redrawn in place; the rest as lines.

    Once the front end fails, plain lines.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._area, self._is_shown = Area(), True
        self._losses: list[float] = []
        self._metrics: Metrics | None = None
        self._step = 0
        self._started = self._drawn = -math.inf

    def __exit__(self, *_: object) -> None:
        if self._step and self._is_shown:
            self._draw()

    def start(self, num_steps: int) -> None:
        super().start(num_steps)
        self._started = time.monotonic()
        self._draw()

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        if not self._is_shown:
            return super().step(record, metrics)
        Progress.step(self, record, metrics)
        self._step = record.step
        if metrics is not None:
            self._metrics = metrics
            self._losses.append(metrics.loss)
        if time.monotonic() - self._drawn >= _REDRAWN_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn, metrics = time.monotonic(), self._metrics
        words = f"step {self._step}/{self.num_steps}"
        if metrics is not None:
            words += f", epoch {metrics.epoch:.2f}, {clock(self._drawn - self._started)} elapsed"
            words += f", {clock(self.seconds_left(self._step))} left" if self._step < self.num_steps else ""
        values = {} if metrics is None else _values(metrics)
        html = progress_html(self._step, self.num_steps, words, values, self._losses)
        try:
            self._area.show(html, words if metrics is None else self._line(metrics))
        except Exception:  # whatever a front end raises, the run goes on
            self._is_shown = False


class RichProgress(Progress):
    """A bar and the latest numbers, redrawn four times a second; plain lines once the terminal fails."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._plain: PlainProgress | None = None
        self._console = Console(file=raw_stream(stream), highlight=False, markup=False, emoji=False)
        self._bar = _Bar(
            TextColumn("step {task.completed}/{task.total}{task.fields[epoch]}", "bold", markup=False),
            BarColumn(bar_width=None),
            _Times(),
            console=self._console,
        )
        self._task: TaskID | None = None

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._bar.stop()

    def _lines(self) -> PlainProgress | None:
        """Return the plain lines that replace the bar once its terminal has failed."""
        if self._plain is None and getattr(self._stream, "fault", None):
            self._stop()
            self._plain = PlainProgress(self._stream)
            self._plain.num_steps = self.num_steps
        return self._plain

    def stage(self, text: str) -> None:
        if lines := self._lines():
            return lines.stage(text)
        self._console.print(shown(text), style="dim")

    def warn(self, text: str) -> None:
        if lines := self._lines():
            return lines.warn(text)
        self._console.print(shown(f"warning: {text}"), style="yellow")

    def evaluation(self, evaluation: Evaluation) -> None:
        if lines := self._lines():
            return lines.evaluation(evaluation)
        self._console.print(evaluation_line(evaluation), style="green")

    def start(self, num_steps: int) -> None:
        super().start(num_steps)
        if lines := self._lines():
            return lines.start(num_steps)
        self._task = self._bar.add_task("", total=num_steps, epoch="", left="-:--")
        self._bar.start()

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        super().step(record, metrics)
        if lines := self._lines():
            return lines.step(record, metrics)
        assert self._task is not None
        if metrics is not None:
            self._bar.show(metrics)
            self._bar.update(self._task, epoch=f", epoch {metrics.epoch:.2f}")
        self._bar.update(self._task, completed=record.step, left=clock(self.seconds_left(record.step)))


class _Bar(RichBar):
    """rich's bar above a table of the latest numbers."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self._metrics: Metrics | None = None
        self._losses: deque[float] = deque(maxlen=10_000)
        super().__init__(*columns, console=console, refresh_per_second=4, expand=True)

    def show(self, metrics: Metrics) -> None:
        if math.isfinite(metrics.loss):
            self._losses.append(metrics.loss)
        self._metrics = metrics

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield (
            Text("waiting for the first step", style="dim")
            if self._metrics is None
            else self._numbers(self._metrics)
        )

    def _numbers(self, metrics: Metrics) -> Table:
        values = _values(metrics)
        fields = {
            "loss": (values.pop("loss"), "bold cyan"),
            "": (f"{sparkline(list(self._losses)):12}", "cyan"),
            **{name: (value, "") for name, value in values.items()},
        }
        table = Table.grid(padding=(0, 2))
        for _ in fields:
            table.add_column(no_wrap=True)
        table.add_row(*(Text(name, style="dim") for name in fields))
        table.add_row(*(Text(value, style=style) for value, style in fields.values()))
        return table


class _Times(ProgressColumn):
    """Time elapsed, and left by the recent steps: rich's own estimate would count evaluations and saves."""

    def render(self, task: Task) -> Text:
        return Text(f"{clock(task.elapsed or 0.0)} elapsed, {task.fields['left']} left")


def choose_progress(mode: str, stream: TextIO | None = None) -> Progress:
    """Return the display for `progress: auto|rich|plain|off` on `stream`, by default standard output."""
    stream = stream or sys.stdout
    if mode == "off":
        return Progress()
    if mode == "rich":
        return RichProgress(stream)
    if mode == "auto":
        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal and not below_notebook():
            return RichProgress(stream)
        if in_notebook(stream):
            return NotebookProgress(stream)
    return PlainProgress(stream)


def evaluation_line(evaluation: Evaluation) -> str:
    parts = [f"loss {number(evaluation.eval_loss)}", *_rewards(evaluation.metrics)]
    if evaluation.eval_perplexity is not None:
        parts.append(f"perplexity {number(evaluation.eval_perplexity)}")
    tokens = count(evaluation.eval_tokens, "token")
    return f"evaluation after step {evaluation.step}: {', '.join(parts)} over {tokens}"


def _values(metrics: Metrics) -> dict[str, str]:
    """Return the latest numbers by name, as the live displays show them."""
    return {
        "loss": number(metrics.loss),
        **{name: value for name, _, value in map(_cut, _rewards(metrics.preferences))},
        "rate": f"{metrics.learning_rate:.2e}",
        "grad norm": number(metrics.grad_norm),
        "tokens/s": rate(metrics.tokens_per_second) + _each(metrics.ranks),
        **({"mfu": f"{metrics.mfu:.0%}"} if math.isfinite(metrics.mfu) else {}),
        "host": size(metrics.host_rss_bytes),
        **({"device": size(metrics.device_bytes)} if metrics.device_bytes else {}),
        **({"slowest": slowest(metrics.ranks)} if metrics.ranks else {}),
    }


def _rewards(metrics: Mapping[str, float]) -> list[str]:
    """Show margin and accuracy of rewards, if any."""
    found = []
    if "rewards/margins" in metrics:
        found.append(f"margin {number(metrics['rewards/margins'])}")
    if "rewards/accuracies" in metrics:
        found.append(f"accuracy {metrics['rewards/accuracies']:.0%}")
    return found


def _each(ranks: Mapping[str, Any]) -> str:
    """Show the speed of each rank of several."""
    return f" ({rate(ranks['tokens_per_second_each'])} per rank)" if ranks else ""


def slowest(ranks: Mapping[str, Any]) -> str:
    """Name the slowest rank and its busiest lane; `-` if the step was not recorded."""
    if ranks.get("slowest") is None:
        return "-"
    lane = ranks.get("slowest_lane")
    return f"rank {ranks['slowest']}" + (f" ({lane})" if lane else "")


def _cut(text: str) -> tuple[str, str, str]:
    return text.partition(" ")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line and flush; replace characters that the stream cannot encode with `?`."""
    stream = stream or sys.stdout
    print(shown(text, stream.encoding), file=stream, flush=True)


def sparkline(values: list[float], width: int = 12) -> str:
    """Draw `values` in at most `width` characters, each the mean of an equal share of them."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((mean - low) / span * 8))] for mean in means)


def number(value: float) -> str:
    """Format a loss or perplexity: four decimals below 1000, none above; `nan` and `inf` as they are."""
    size = abs(value)
    return f"{value:.4f}" if size < 1000 else f"{value:,.0f}" if size < 1e6 else f"{value:.3g}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Format as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
