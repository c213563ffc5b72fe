"""Figures of the ranks of a run: in the line of metrics, the display and the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.errors import DataError
from horizon_lm.report.by_rank import figures_of_all
from horizon_lm.report.display import PlainProgress, RichProgress
from horizon_lm.report.metrics import Metrics, read_steps
from horizon_lm.report.records import StepRecord
from report_pages import report_of, write_lines


def figures(network: float, lanes: dict[str, float] | None = None) -> dict[str, Any]:
    """What a rank has measured over two steps."""
    lanes = {} if lanes is None else lanes
    return {"network": network, "exchanges": 0.2, "bytes": 3000, "lanes": lanes, "host": 10**9}


LANES = [
    {"network": 0.9, "compute": 0.5, "update": 0.2},
    {"network": 0.1, "compute": 0.6, "update": 1.2},
    {"network": 0.8, "compute": 0.5},
]


def test_the_rank_that_waits_least_is_the_slowest() -> None:
    """Others wait in the network lane for it; its busiest other lane is what to look at."""
    line = figures_of_all([figures(1.0, LANES[0]), figures(0.4, LANES[1]), figures(0.8, LANES[2])], 2, 300.0)
    assert line == {
        "world": 3,
        "tokens_per_second_each": 100.0,
        "bytes_sent": 1500.0,
        "network_seconds": [0.5, 0.2, 0.4],
        "waiting_seconds": pytest.approx([0.4, 0.1, 0.3]),
        "host_rss_bytes": [10**9] * 3,
        "slowest": 1,
        "slowest_lane": "update",
    }


def test_a_step_that_was_not_recorded_has_no_slowest_rank() -> None:
    assert "slowest" not in figures_of_all([figures(1.0, LANES[0]), figures(0.4)], 2, 300.0)


def metrics(ranks: dict[str, Any]) -> Metrics:
    return Metrics(8, 1.0, 2.0, 1.0, 1e-4, 3000.0, 0.5, 80, 70, 2.0, 0, 10**9, 0, {}, {}, ranks)


RANKS = figures_of_all([figures(1.0, LANES[0]), figures(0.4, LANES[1])], 2, 3000.0)


def test_a_line_of_one_rank_has_no_key_more() -> None:
    assert "ranks" not in metrics({}).to_line()
    assert metrics(RANKS).to_line()["ranks"] == RANKS


def test_a_checkpoint_does_not_depend_on_the_number_of_ranks() -> None:
    assert metrics(RANKS).to_json() == metrics({}).to_json()
    assert Metrics.from_json(metrics(RANKS).to_json()) == metrics({})


@pytest.mark.parametrize(("ranks", "is_shown"), [(RANKS, True), ({}, False)])
def test_progress_shows_each_rank_and_the_slowest(ranks: dict[str, Any], is_shown: bool) -> None:
    record = StepRecord(8, 1.0, 2.0, 1.0, 1e-4, 70, 0.1, False)
    out = io.StringIO()
    progress = PlainProgress(out)
    progress.start(8)
    progress.step(record, metrics(ranks))
    assert ("3,000 tokens/s (1,500 per rank)" in out.getvalue()) is is_shown
    assert ("slowest rank 1 (update)" in out.getvalue()) is is_shown
    assert "3,000 tokens/s" in out.getvalue()
    with RichProgress(io.StringIO()) as rich:
        rich.start(8)
        rich.step(record, metrics(ranks))
        columns = [str(column.header) for column in rich._bar._numbers(metrics(ranks)).columns]
        cells = " ".join(
            str(c) for column in rich._bar._numbers(metrics(ranks)).columns for c in column.cells
        )
    assert ("rank 1 (update)" in cells) is is_shown and ("1,500 per rank" in cells) is is_shown
    assert columns is not None


def lines(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [{**metrics(one).to_line(), "step": n, "event": "step"} for n, one in enumerate(ranks, start=1)]
    return [{"event": "start", "num_steps": len(ranks)}, *steps]


def test_the_report_has_a_table_of_the_ranks(tmp_path: Path) -> None:
    page, _ = report_of(write_lines(tmp_path / "run", lines([RANKS] * 4)))
    assert "Ranks" in page.text("h2")
    assert "Others waited most for rank 1, busiest on the lane update: in 100% of the recorded steps." in (
        page.text("p")
    )
    assert "A rank sent up to 1.50 kB per step." in page.text("p")
    cells = page.text("td")
    at = cells.index("0.500")
    assert cells[at - 1 : at + 7] == ["0", "0.500", "0.400", "1.00 GB", "1", "0.200", "0.100", "1.00 GB"]


def test_the_report_of_one_rank_has_none(tmp_path: Path) -> None:
    page, _ = report_of(write_lines(tmp_path / "run", lines([{}] * 4)))
    assert "Ranks" not in page.text("h2")


def test_a_run_that_went_on_with_fewer_ranks_shows_the_last_ones(tmp_path: Path) -> None:
    page, _ = report_of(write_lines(tmp_path / "run", lines([{**RANKS, "world": 3}, {}, RANKS, RANKS])))
    assert "Ranks" in page.text("h2")
    page, _ = report_of(write_lines(tmp_path / "run", lines([RANKS, RANKS, {}])))
    assert "Ranks" not in page.text("h2")


@pytest.mark.parametrize("changes", [{"world": 0}, {"network_seconds": ["a"]}, {"slowest": -1}])
def test_damaged_figures_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = write_lines(tmp_path / "run", lines([{**RANKS, **changes}]))
    with pytest.raises(DataError, match=f"ranks.{next(iter(changes))}"):
        read_steps(run / "metrics.jsonl")
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[1])["ranks"]
