"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from .folder import writing
from .metrics import read_steps

_LOSS, _RATE = "#1f5fa8", "#c8781e"


def plot_loss(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw loss and learning rate over the steps of a metrics file into a PNG; whole or absent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_steps(metrics)
    steps = [record["step"] for record in records]
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    smooth = smoothed(losses)

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = axes.twinx()
    rates.plot(steps, [record["learning_rate"] for record in records], color=_RATE, lw=1.2, ls=(0, (4, 2)))
    rates.set_ylabel("learning rate", color=_RATE)
    rates.tick_params(axis="y", labelcolor=_RATE)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    rates.set_ylim(bottom=0)
    rates.spines["top"].set_visible(False)

    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, losses, color=_LOSS, lw=0.8, alpha=0.4, label="each record", marker=marker)
    axes.plot(steps, smooth, color=_LOSS, lw=2.0, label="smoothed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)", color=_LOSS)
    axes.tick_params(axis="y", labelcolor=_LOSS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["top"].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_zorder(rates.get_zorder() + 1)  # the loss in front of the learning rate
    axes.patch.set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(title, fontsize=11)

    staging = picture.with_name(f".{picture.name}.tmp")
    try:
        with writing(picture):
            figure.savefig(staging, format="png")
            os.replace(staging, picture)
    finally:
        staging.unlink(missing_ok=True)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, unbiased at the start; passes over NaN."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight if weight else math.nan)
    return result
