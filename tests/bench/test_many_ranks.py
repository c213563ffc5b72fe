"""The benchmark of several ranks: groups of workers, bytes by the formula, tables, resumption."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import many_ranks, report
from benchmarks.jobs import InlineWorker, Ledger
from benchmarks.many_ranks import EXACT, FAST
from benchmarks.rank_group import RANKS, CheckoutWorker, RankGroup, by_threads, checkouts, combined

from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import OURS, Worker, WorkerError, measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

TINY = Case(shape("tiny"), length=32, sequences=4, rows=1, dtype="float32", warmup=1, steps=2, threads=1)
HOUR = 3600.0


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    helpers = str(Path(__file__).parents[1] / "helpers")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "results"


def test_a_group_trains_as_one_rank_and_counts_what_it_sends() -> None:
    """Two ranks with `exact` have the losses of one; the bytes are those of their collectives."""
    case = TINY.replace(extra={"reduction": "exact"})
    (one,) = measure([(OURS, TINY)], kind=InlineWorker)
    (two,) = measure([(RANKS, case)], kind=by_threads(2))  # type: ignore[arg-type]
    assert (one["status"], two["status"]) == ("done", "done"), two
    assert two["losses"] == one["losses"] and len(two["ranks"]) == 2
    sent = {answer["breakdown"]["sent"] for answer in two["ranks"]}
    assert sent == {many_ranks.by_ops(two, 2, False, 4)}
    assert many_ranks.by_ops(two, 2, True, 4) == sent.pop()  # fp32: as much in each collective
    cells = many_ranks.network_cells("tiny", {"systems": {EXACT: two, FAST: two}})
    moving, waits, step = float(cells[0][2]), cells[0][3].split(", "), float(cells[0][5])
    assert 0 < moving < step and len(waits) == 2 and min(map(float, waits)) >= 0


def test_a_rank_that_fails_ends_its_group() -> None:
    with RankGroup("bench_systems:broken", TINY, deadline=time.monotonic() + HOUR, world=2) as group:
        with pytest.raises(WorkerError) as error:
            group.build()
        assert error.value.row["why"] == "ValueError: a fault"
    assert all(worker._process.returncode is not None for worker in group._workers)


def test_a_group_is_as_slow_as_its_slowest_rank() -> None:
    peaks = {"host": 3, "steps": 2, "device": 0, "reserved": 0, "pinned": 0}
    answers = [
        {"seconds": 1.0, "cpu_seconds": 2.0, "loss": 4.0},
        {"seconds": 3.0, "cpu_seconds": 1.0, "loss": 2.0},
    ]
    found = combined(answers)
    assert (found["seconds"], found["cpu_seconds"], found["loss"], found["ranks"]) == (3.0, 3.0, 3.0, answers)
    assert combined([{"peaks": peaks}, {"peaks": peaks}])["peaks"]["host"] == 6


def test_the_formula_is_that_of_the_guide() -> None:
    """By hand: 10 parameters, 6 of them in layers and 2 in the embedding table, bf16."""
    formula, sizes = many_ranks.formula, (10, 6, 2)
    assert formula(sizes, 2, 2, False, 2) == 0.5 * (2 * 16 + 2 * 8 * 2)
    assert formula(sizes, 4, 1, False, 2) == 0.75 * (2 * 16 + 2 * 8)
    assert formula(sizes, 2, 2, True, 2) == 0.5 * (2 * 16 + 4 * 8)
    assert formula(sizes, 1, 4, False, 2) == 0  # one rank sends nothing


def test_workers_of_another_checkout_import_from_it(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    make = checkouts([None, tmp_path])
    workers = [make("bench_systems:Toy", TINY, deadline=time.monotonic() + HOUR) for _ in range(2)]
    try:
        assert type(workers[0]) is Worker and isinstance(workers[1], CheckoutWorker)
        assert workers[1].environment()["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "src")
    finally:
        for worker in workers:
            worker.__exit__()


# ---- tables ---------------------------------------------------------------------------------


def done(seconds: float, **more: Any) -> Row:
    row = {"status": "done", "seconds": [seconds] * 3, "cpu_seconds": [seconds] * 3, "losses": [2.0, 1.0]}
    return row | {"tokens_per_second": [2048 / seconds] * 3} | more


def test_the_goal_is_met_or_missed_by_a_share() -> None:
    systems = {"ours, 1 rank": done(1.0), EXACT: done(1.1), FAST: {"status": "failed", "why": "no"}}
    rows = {row[1]: row for row in many_ranks.speed_cells("tiny", {"systems": systems})}
    assert rows[EXACT][3].startswith("0.909") and rows[EXACT][-2:] == ["0.85", "yes"]
    assert rows[FAST][2] == "failed: no" and rows["ours, 1 rank"][-1] == ""
    systems[EXACT] = done(2.0)
    rows = {row[1]: row for row in many_ranks.speed_cells("tiny", {"systems": systems})}
    assert rows[EXACT][-1] == "NO, 41.2% short"
    row = {"status": "done", "predicted": 100, "measured": [98.0, 104.0]}
    assert many_ranks.memory_cells("tiny", row)[-1] == "NO, 3.8%"


def test_measurements_are_kept_and_the_report_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_results: Path
) -> None:
    ran: list[str] = []
    alone = {"now": done(1.0, peaks={"host": 2}), "then": done(1.0, peaks={"host": 2}), "load": [0.0, 0.0]}

    def jobs(arguments: Any) -> dict[str, Any]:
        return {"alone/tiny": lambda: ran.append("alone") or {"status": "done", **alone}}

    monkeypatch.setattr(many_ranks, "WORK", tmp_path)
    monkeypatch.setattr(many_ranks, "jobs_of", jobs)
    for _ in range(2):
        many_ranks.main([])
    assert ran == ["alone"]
    many_ranks.main(["--fresh"])
    assert ran == ["alone", "alone"]
    (file,) = no_results.glob("*-many-ranks-cpu.md")
    assert "| tiny | 2,048 | 1.000 (1.000 to 1.000) |" in file.read_text()
    assert Ledger(tmp_path / "many-ranks.jsonl", "another commit").get("alone/tiny") is None


def test_all_parts_have_jobs() -> None:
    arguments = many_ranks.options(["--before", "there", "--sizes", "tiny", "--peers"])
    names = list(many_ranks.jobs_of(arguments))
    assert {name.partition("/")[0] for name in names} == {"bytes", "speed", "memory", "alone"}
    assert "bytes/tiny/bfloat16/3/fast" in names and "speed/tiny, float32, 2 micro-batches" in names
    arguments = many_ranks.options(["--parts", "alone", "--sizes", "tiny"])
    assert not many_ranks.jobs_of(arguments)  # no earlier checkout
