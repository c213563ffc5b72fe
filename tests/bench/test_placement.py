"""The simulated table of residents and rounds: what is executed, references, words, goals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmarks import placement, simulated
from benchmarks.report import Report

from horizon_lm.bench.models import shape, work_of
from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.engine.homes import resident_order
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.run_plan import RunPlan, plan_run

# The layer is of the table's size; three layers suffice.
CASE = Case(
    shape("qwen3-4b", num_hidden_layers=3), 1024, sequences=4, rows=1, device="cuda", activations="recompute"
)


@pytest.fixture(scope="module")
def streamed() -> RunPlan:
    config = train_config(CASE).replace(resident=0, rounds=1)
    return plan_run(config, placement.HARDWARE, cache=OutlineCache())


def changed(plan: RunPlan, **changes: Any) -> RunPlan:
    config = plan.config.replace(**changes)
    return replace(plan, config=config, prediction=plan.planner.predict(config))


def found(plan: RunPlan, **changes: Any) -> placement.Found:
    return placement.Found(CASE.replace(**changes), "both", plan, placement.same_arithmetic(plan), None)


def test_executed_products_count_what_is_recomputed(streamed: RunPlan) -> None:
    """6 N with nothing recomputed, and 2 more for each parameter of a layer that runs forward twice, without
    its last product."""
    work, _ = work_of(CASE)
    n = work.model.per_token / 6
    layer = work.layers.per_token / 2 / 3
    last = CASE.model["hidden_size"] * CASE.model["intermediate_size"]
    twice = 2  # of three layers: the last one runs once
    expected = {"keep": 6.0, "products": 6.0, "recompute": 6 + 2 * twice * (layer - last) / n}
    for policy, executed in expected.items():
        row = found(changed(streamed, activations=policy))
        assert row.executed == pytest.approx(executed, rel=2e-3), policy
    assert expected["recompute"] > 6.3  # the goal would notice


def test_the_reference_executes_the_same_in_memory(streamed: RunPlan) -> None:
    """Few tokens: streaming waits for the host. A plan that is all resident is its own reference."""
    row = found(streamed)
    assert row.practicality < 0.9
    units = len(resident_order(streamed.planner.outline))
    resident = changed(streamed, resident=units, boundaries="device", round_sums="device")
    assert found(resident).practicality == pytest.approx(1.0)
    assert placement.executed_flops(resident.prediction) == placement.executed_flops(streamed.prediction)
    assert found(resident).rate == row.same_arithmetic


def test_the_best_in_memory_run_fits_the_device() -> None:
    best = placement.best_in_memory(CASE, OutlineCache())
    assert best is not None and best > 0
    wide = CASE.replace(model=shape("qwen2.5-14b"))
    assert placement.best_in_memory(wide, OutlineCache()) is None


def test_a_row_is_told_in_words(streamed: RunPlan) -> None:
    row = found(
        changed(streamed, resident=2, rounds=4, round_sums="host", activations=["recompute*1", "keep*2"])
    ).cells()
    cells = dict(zip(placement.HEAD, row, strict=True))
    assert cells["step"] == "4 x 1 in 4 rounds, sums: host"
    assert cells["layers"] == "recompute 1, keep 2" and cells["residents"] == "table and head, 1 of 3 layers"
    alone = found(streamed).cells()
    assert alone[placement.HEAD.index("residents")] == "none"
    assert alone[placement.HEAD.index("step")] == "4 x 1"


def test_goals_are_those_of_their_steps(streamed: RunPlan) -> None:
    at_16k = replace(found(streamed), case=placement.case_of("qwen3-4b", 16), same_arithmetic=1e-9)
    assert (
        placement.goals([at_16k])[0][0].endswith("Qwen3-4B, 16k")
        and placement.goals([at_16k])[0][-1] == "yes"
    )
    slow = replace(at_16k, same_arithmetic=at_16k.rate / 0.97)
    assert placement.goals([slow])[0][-2:] == ["0.970", "no"]
    other = replace(at_16k, case=placement.case_of("qwen3-4b", 64))
    assert placement.goals([other, replace(at_16k, choices="streamed")]) == []


def test_each_part_has_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    written: list[str] = []
    monkeypatch.setattr(placement, "fill", lambda report: report.parts.append("a table"))
    monkeypatch.setattr(Report, "write", lambda self, folder=None: written.append(self.name))
    simulated.main(["--part", "residents-and-rounds"])
    assert written == ["residents-and-rounds-simulated"]
