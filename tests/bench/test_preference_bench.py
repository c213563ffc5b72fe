"""The benchmark of preferences and of TRL's trainers: whole runs as systems, equal rows, honest tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from benchmarks import preference_runs, preferences, report
from benchmarks.jobs import InlineWorker

from horizon_lm.bench.jobs import measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

TINY = Case(shape("tiny"), length=32, sequences=2, rows=2, dtype="float32", warmup=0, steps=2, threads=1)


def options(*more: str) -> argparse.Namespace:
    few = ["--sizes", "tiny", "--dtypes", "float32", "--length", "32", "--threads", "1", "--steps", "1"]
    found = preferences.options([*few, *more])
    found.inline = True
    return found


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_runs_of_ours_and_of_trl_take_their_steps_one_by_one(method: str, tmp_path: Path) -> None:
    """Each on documents of the case's length: DPO's loss begins at log 2, SFT's at log of the vocabulary."""
    preference_runs.make_folder(TINY, tmp_path)
    case = TINY.replace(extra={"method": method, "folder": str(tmp_path)})
    names = ("horizon_train", "ours", "theirs")
    rows = measure([(preferences.RUNS + name, case) for name in names], kind=InlineWorker)
    for row in rows:
        assert row["status"] == "done", row
        assert len(row["seconds"]) == case.steps and all(s > 0 for s in row["seconds"])
        expected = 0.6931 if method == "dpo" else 5.545
        assert row["losses"] == pytest.approx([expected] * case.steps, rel=0.02)


def test_a_run_that_fails_or_ends_is_a_row_that_says_so(tmp_path: Path) -> None:
    case = TINY.replace(extra={"method": "sft", "folder": str(tmp_path / "none")})
    (row,) = measure([(preferences.RUNS + "horizon_train", case)], kind=InlineWorker)
    assert row["status"] == "failed"
    rows = preferences.compare_runs(case, {"horizon train": row, "HorizonSFTTrainer": row, "SFTTrainer": row})
    assert [r[2] for r in rows] == ["HorizonSFTTrainer / horizon train", "HorizonSFTTrainer / SFTTrainer"]
    assert all(len(r) == len(preferences.HEAD) and row["why"] in r[3] for r in rows)
    with pytest.raises(RuntimeError, match="ended before its last step"):
        preference_runs.GatedRun(case, lambda case, gate, folder: None)


def test_steps_take_turns_and_the_table_says_what_was_missed() -> None:
    found = report.Report("test", "about", command="none")
    rows = preferences.fill(found, options("--parts", "steps"))
    assert [row[2] for row in rows] == ["DPO step / SFT step", "reference pass / SFT step"]
    assert "| DPO step / SFT step |" in "\n".join(found.parts)
    fast, slow = ([0.1] * 3, [0.2] * 3)
    assert preferences.compare("DPO step / SFT step", TINY, fast, slow)[5:] == [
        "2.000 (2.000 to 2.000)",
        "0.95",
        "yes",
    ]
    assert preferences.compare("DPO step / SFT step", TINY, slow, fast)[7] == "NO, 47.4% short"
