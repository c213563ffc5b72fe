"""What a run shows while it works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Self, TextIO

from horizon_lm.io.output import raw_stream
from horizon_lm.report.events import Evaluation, StepRecord
from horizon_lm.report.metrics import Metrics
from horizon_lm.text import shown
from horizon_lm.words import count, size

if TYPE_CHECKING:
    from rich.console import RenderableType

_PLAIN_SECONDS = 1.0  # between two plain lines
_RECENT_STEPS = 50


class Progress:
    """Shows nothing (`progress: off`); the base of the displays that do. A context around the steps.

    `stage` comes before the steps, `start` and then `step` for each, with its metrics where it is a
    logging step.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def stage(self, text: str) -> None:
        """Say what is being done before or after the steps."""

    def warn(self, text: str) -> None:
        """Say what went wrong without ending the run."""

    def start(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        self._recent.append(record.seconds)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Show an evaluation on the held-out set."""

    def seconds_left(self, step: int) -> float:
        """Estimated from the recent steps."""
        return (self.num_steps - step) * sum(self._recent) / max(1, len(self._recent))


class PlainProgress(Progress):
    """A line at logging steps, about one a second at most, and always at the first and the last step."""

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
            f"lr {metrics.learning_rate:.2e}",
            f"grad norm {number(metrics.grad_norm)}",
            f"{rate(metrics.tokens_per_second)} tokens/s",
            *([f"mfu {metrics.mfu:.0%}"] if math.isfinite(metrics.mfu) else []),
            f"left {clock(self.seconds_left(metrics.step))}",
            f"host {size(metrics.host_rss_bytes)}",
            *([f"device {size(metrics.device_bytes)}"] if metrics.device_bytes else []),
        )
        return "  ".join(fields)


class RichProgress(Progress):
    """A bar and the latest numbers, redrawn in place four times a second; plain lines if that fails."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._plain: PlainProgress | None = None
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=raw_stream(stream), highlight=False, markup=False, emoji=False)
        self._done = 0
        self._metrics: Metrics | None = None
        self._losses: deque[float] = deque(maxlen=10_000)
        self._started = time.monotonic()
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="crop"
        )

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _lines(self) -> PlainProgress | None:
        """What goes on once there is no terminal to draw on."""
        if self._plain is None and getattr(self._stream, "fault", None):
            self._live.stop()
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
        self._started = time.monotonic()
        if lines := self._lines():
            return lines.start(num_steps)
        self._live.start()

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        super().step(record, metrics)
        if lines := self._lines():
            return lines.step(record, metrics)
        self._done = record.step
        self._metrics = metrics or self._metrics
        if metrics is not None and math.isfinite(metrics.loss):
            self._losses.append(metrics.loss)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        elapsed = clock(time.monotonic() - self._started)
        left = clock(self.seconds_left(self._done)) if self._done else "-:--"
        bar.add_row(
            Text(f"step {self._done}/{self.num_steps}{self._epoch()}", style="bold"),
            ProgressBar(total=self.num_steps, completed=self._done),
            Text(f"{elapsed} gone, {left} left"),
        )
        if self._metrics is None:
            return Group(bar, Text("the first step", style="dim"))
        return Group(bar, self._numbers(self._metrics))

    def _epoch(self) -> str:
        return f", epoch {self._metrics.epoch:.2f}" if self._metrics is not None else ""

    def _numbers(self, metrics: Metrics) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        fields = {
            "loss": (number(metrics.loss), "bold cyan"),
            "": (f"{sparkline(list(self._losses)):12}", "cyan"),
            "rate": (f"{metrics.learning_rate:.2e}", ""),
            "grad norm": (number(metrics.grad_norm), ""),
            "tokens/s": (rate(metrics.tokens_per_second), ""),
            **({"mfu": (f"{metrics.mfu:.0%}", "")} if math.isfinite(metrics.mfu) else {}),
            "host": (size(metrics.host_rss_bytes), ""),
            **({"device": (size(metrics.device_bytes), "")} if metrics.device_bytes else {}),
        }
        table = Table.grid(padding=(0, 2))
        for _ in fields:
            table.add_column(no_wrap=True)
        table.add_row(*(Text(name, style="dim") for name in fields))
        table.add_row(*(Text(value, style=style) for value, style in fields.values()))
        return table


def choose_progress(mode: str, stream: TextIO | None = None) -> Progress:
    """The display for `progress: auto|rich|plain|off` on `stream` (standard output by default)."""
    stream = stream or sys.stdout
    if mode == "off":
        return Progress()
    if mode == "rich":
        return RichProgress(stream)
    if mode == "auto":
        from rich.console import Console

        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return RichProgress(stream)
    return PlainProgress(stream)


def evaluation_line(evaluation: Evaluation) -> str:
    return (
        f"evaluation after step {evaluation.step}: loss {number(evaluation.eval_loss)}, perplexity "
        f"{number(evaluation.eval_perplexity)} over {count(evaluation.eval_tokens, 'token')}"
    )


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once; characters that the stream cannot show become `?`."""
    stream = stream or sys.stdout
    print(shown(text, stream.encoding), file=stream, flush=True)


def sparkline(values: list[float], width: int = 12) -> str:
    """The course of `values` in `width` characters, each the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((mean - low) / span * 8))] for mean in means)


def number(value: float) -> str:
    """Four places at the sizes that a loss has, none for a large perplexity; `nan` and `inf` as they are."""
    size = abs(value)
    return f"{value:.4f}" if size < 1000 else f"{value:,.0f}" if size < 1e6 else f"{value:.3g}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """h:mm:ss, without the hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
