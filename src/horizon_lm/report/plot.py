"""Picture of a run's loss curves: training and held-out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from horizon_lm.checkpoint.folder import writing
from horizon_lm.io import files
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOSS, _HELD_OUT, _RATE = "#1f5fa8", "#bc4c00", "#6e7781"


def plot_loss(metrics: Path, picture: Path, *, title: str) -> None:
    """Write the picture of `draw_loss` as a PNG, atomically."""
    figure = draw_loss(metrics, title=title)
    with writing(picture):
        files.write_file(picture, lambda file: figure.savefig(file, format="png"))


def draw_loss(metrics: Path, *, title: str) -> Figure:
    """Draw training loss, held-out loss if any, and learning rate over the steps of a metrics file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import MaxNLocator

    records = read_steps(metrics)
    steps = [record["step"] for record in records]
    losses = [math.nan if record.get("loss") is None else record["loss"] for record in records]
    smooth = smoothed(losses)

    figure = _inline_figure()(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = axes.twinx()
    given = [math.nan if (rate := record.get("learning_rate")) is None else rate for record in records]
    rates.plot(steps, given, color=_RATE, lw=1.2, ls=(0, (4, 2)))
    rates.set_ylabel("learning rate", color=_RATE)
    rates.tick_params(axis="y", labelcolor=_RATE)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    rates.set_ylim(bottom=0)
    rates.spines["top"].set_visible(False)

    held_out = read_evaluations(metrics)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, losses, color=_LOSS, lw=0.8, alpha=0.4, label="training", marker=marker)
    axes.plot(steps, smooth, color=_LOSS, lw=2.0, label="training, smoothed")
    if held_out:
        losses = [math.nan if e.get("eval_loss") is None else e["eval_loss"] for e in held_out]
        few = len(held_out) <= 60
        axes.plot(
            [e["step"] for e in held_out],
            losses,
            color=_HELD_OUT,
            lw=1.6,
            marker="o" if few else None,
            ms=4,
            label="held-out",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["top"].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_zorder(rates.get_zorder() + 1)  # the loss in front of the learning rate
    axes.patch.set_visible(False)
    axes.legend(framealpha=0.8, edgecolor="none", loc="upper right")
    axes.set_title(one_line(title), fontsize=11, parse_math=False)
    return figure


@cache
def _inline_figure() -> type[Figure]:
    """Return a Figure that Jupyter shows without `%matplotlib` and pyplot's global state."""
    from matplotlib.figure import Figure

    class InlineFigure(Figure):
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            """Return the picture and its width in CSS pixels."""
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue(), {"width": round(self.get_figwidth() * 96)}

    return InlineFigure


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential mean over about a twentieth of the values, unbiased at the start; skip NaN."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight if weight else math.nan)
    return result
