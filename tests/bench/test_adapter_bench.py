"""The benchmark of adapters: equal first losses, ratios of steps in turn, bytes as planned."""

from __future__ import annotations

import pytest
from benchmarks import adapters, report

from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--sizes", "tiny", "--length", "16", "--threads", "1", "--dtypes", "float32"]


def test_a_small_run_fills_both_tables() -> None:
    found = report.Report("adapters-cpu", "about")
    rows = adapters.fill(found, adapters.options(TINY))
    assert [row[2] for row in rows] == list(adapters.GOALS) and all(len(row) == 9 for row in rows)
    text = "\n".join(found.parts)
    for base_dtype, about in adapters.BYTES.items():
        (line,) = (row for row in text.splitlines() if f"| {base_dtype} |" in row)
        planned, held, _ = (float(cell) for cell in line.strip("| ").split(" | ")[2:])
        assert planned == held == pytest.approx(about, rel=0.2)  # a tiny model's norms and gaps weigh more


def test_systems_that_compute_something_else_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of equal losses: a peer on other weights."""
    case = Case(shape("tiny"), length=16, warmup=0, steps=1, rows=1, dtype="float32", threads=1)

    class Other(adapters.Peft):
        def __init__(self, case: Case) -> None:
            super().__init__(case.replace(seed=case.seed + 1))

    monkeypatch.setattr(adapters, "Peft", Other)
    with pytest.raises(RuntimeError, match="first losses differ"):
        adapters.run_case(case)


def test_the_verdict_is_that_of_the_ratio_of_turns() -> None:
    case = Case(shape("tiny"), length=16, rows=1, dtype="float32")
    fast, slow = [(1.0, 1.0)] * 3, [(1.3, 1.2), (1.2, 1.2), (1.1, 1.2)]
    row = adapters.compare(case, "lora / peft", {"lora": fast, "peft": slow})
    assert row[3:5] == ["16", "13"] and row[5:] == [
        "1.200 (1.100 to 1.300)",
        "1.200 (1.200 to 1.200)",
        "1",
        "yes",
    ]
    row = adapters.compare(case, "lora keep / full keep", {"lora keep": fast, "full keep": slow})
    assert row[-1] == "NO, 4.0% short"
    assert adapters.compare(case, "lora / full", {"lora": fast, "full": slow})[-2:] == ["", ""]
