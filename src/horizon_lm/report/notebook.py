"""What Jupyter shows of a run: a display that is redrawn in place, and a small loss curve.

IPython is imported only inside a kernel, which has it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TextIO

_WIDTH, _HEIGHT = 480.0, 90.0  # of the curve, in CSS pixels
_MOST_POINTS = 240
_STYLES = {
    "curve": f"display:block;width:100%;max-width:{_WIDTH:.0f}px;height:{_HEIGHT:.0f}px;margin:4px 0",
    "bar": "width:100%;max-width:240px;vertical-align:middle",
}


def in_notebook(stream: TextIO) -> bool:
    """Tell whether `stream` leads to a cell's output: that of a Jupyter kernel in this process."""
    return hasattr(stream, "pub_thread") and "ipykernel" in sys.modules  # ipykernel.iostream.OutStream


def below_notebook() -> bool:
    """Tell whether a kernel started this process, as `!horizon train` in a cell does.

    Its standard output looks like a terminal, but a cell cannot move the cursor: each redraw would add lines.
    """
    return "JPY_PARENT_PID" in os.environ


class Area:
    """A part of a cell's output that `show` replaces; it appears with the first call."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, html: str, text: str) -> None:
        """text: for programs that show no HTML."""
        from IPython.display import display

        content = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def progress_html(
    done: int, total: int, words: str, values: Mapping[str, str], losses: Sequence[float]
) -> str:
    """Return a bar, a line of words, the latest values and the losses so far as HTML."""
    bar = f'<progress value="{done}" max="{total}" style="{_STYLES["bar"]}"></progress>'
    return f"<div>{bar} {escape(words)}</div>{curve_svg(losses)}{table_html(values)}"


def table_html(values: Mapping[str, str]) -> str:
    """Return a table of one row: names above values."""
    if not values:
        return ""
    names = "".join(f"<th>{escape(name)}</th>" for name in values)
    cells = "".join(f"<td>{escape(value)}</td>" for value in values.values())
    return (
        f'<div style="overflow-x:auto"><table><thead><tr>{names}</tr></thead>'
        f"<tbody><tr>{cells}</tr></tbody></table></div>"
    )


def curve_svg(losses: Sequence[float]) -> str:
    """Draw losses, averaged in groups if there are many, in the colour of the text; empty below two."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    num = min(len(finite), _MOST_POINTS)
    if num < 2:
        return ""
    edges = [round(i * len(finite) / num) for i in range(num + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    points = " ".join(
        f"{i * _WIDTH / (num - 1):.1f},{2 + (1 - (mean - low) / span) * (_HEIGHT - 4):.1f}"
        for i, mean in enumerate(means)
    )
    label = f"loss from {means[0]:.4g} to {means[-1]:.4g}"
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}" style="{_STYLES["curve"]}"><title>{label}</title>'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5" '
        f'vector-effect="non-scaling-stroke"/></svg>'
    )
