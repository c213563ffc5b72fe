"""What a run shows while it goes on, and metrics that a kill cut off."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest

from horizon_lm.report.display import NotebookProgress, RichProgress, choose_progress, clock, say, sparkline
from horizon_lm.report.metrics import Metrics, read_steps
from horizon_lm.report.notebook import Area
from horizon_lm.report.plot import smoothed
from horizon_lm.report.records import StepRecord

pytestmark = pytest.mark.usefixtures("one_thread")


def metrics(step: int, loss: float = 2.0) -> Metrics:
    return Metrics(step, 0.1, loss, 0.5, 1e-3, 1234.5, 0.42, 100, 90, 1.0, 0, 2_000_000_000, 5_000_000)


def record(step: int) -> StepRecord:
    return StepRecord(step, 0.1, 2.0, 0.5, 1e-3, 100, 0.01, False)


def test_plain_progress_prints_one_line_a_second_and_the_first_and_the_last() -> None:
    stream = io.StringIO()
    progress = choose_progress("auto", stream)  # not a terminal
    with progress:
        progress.start(500)
        for step in range(1, 501):
            progress.step(record(step), metrics(step, math.nan if step == 1 else 2.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "loss nan" in lines[0] and lines[1].startswith("step 500/500")
    assert (
        "1,234 tokens/s  mfu 42%" in lines[1]
        and "epoch 0.10" in lines[1]
        and "2.00 GB" in lines[1]
        and "5.00 MB" in lines[1]
    )


def test_rich_progress_shows_the_numbers_and_no_progress_shows_none() -> None:
    stream = io.StringIO()
    progress = choose_progress("rich", stream)
    assert isinstance(progress, RichProgress)
    with progress:
        progress.start(10)
        for step in range(1, 11):
            progress.step(record(step), metrics(step) if step % 2 == 0 else None)
        progress.warn("a [red]warning")
    shown = stream.getvalue()
    for part in (
        "step 10/10",
        "2.0000",
        "1.00e-03",
        "1,234",
        "2.00 GB",
        "5.00 MB",
        "0:00 left",
        "a [red]warning",
    ):
        assert part in shown
    silent = io.StringIO()
    with choose_progress("off", silent) as progress:
        progress.start(1)
        progress.step(record(1), metrics(1))
    assert silent.getvalue() == ""


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_outlives_a_front_end_that_fails(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: one that works is shown no lines."""

    def show(self: Area, html: str, text: str) -> None:
        if fails:
            raise RuntimeError("the front end is gone")

    monkeypatch.setattr(Area, "show", show)
    stream = io.StringIO()
    with NotebookProgress(stream) as progress:
        progress.start(500)
        for step in range(1, 501):
            progress.step(record(step), metrics(step))
    lines = stream.getvalue().splitlines()
    assert (len(lines) == 2 and lines[1].startswith("step 500/500")) if fails else not lines


def test_small_formats() -> None:
    assert (clock(59.7), clock(61), clock(3661)) == ("1:00", "1:01", "1:01:01")
    assert sparkline([]) == "" and sparkline([3.0]) == "▁" and sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([float(-i) for i in range(100)], 8) == "█▇▆▅▄▃▂▁"
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smoothed([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert np.std(smoothed([0.0, 1.0] * 100)[50:]) < 0.1
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("é", ascii_only)
    assert ascii_only.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]


def test_metrics_of_a_killed_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_steps(path) == [{"event": "step", "step": 1}]
