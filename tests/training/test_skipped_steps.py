"""Losses and gradients that are not finite, and runs that are stopped."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horizon_lm import cli
from horizon_lm.engine.ops import Ops
from horizon_lm.engine.updates import Updates
from horizon_lm.errors import NonFiniteError
from horizon_lm.host_model import HostModel, TrainStepOutput
from horizon_lm.machine import heap
from horizon_lm.report.metrics import Metrics, read_steps
from horizon_lm.report.records import StepRecord
from horizon_lm.training import train as run_train
from tiny_runs import built as built
from tiny_runs import entries, settings
from tiny_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def spoil_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Makes the losses of some calls NaN."""

    def spoil(calls: set[int]) -> None:
        honest, count = Ops._loss, iter(range(1, 1000))

        def loss(self: Ops, step: Any, op: Any) -> None:
            honest(self, step, op)
            if op.micro_batch == 0 and next(count) in calls:
                step.losses[op.micro_batch] = torch.tensor(math.nan)

        monkeypatch.setattr(Ops, "_loss", loss)

    return spoil


def test_skipped_steps_update_nothing_and_are_reported(
    text: Path,
    tmp_path: Path,
    built: list[HostModel],
    spoil_losses: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil_losses({2, 3, 5})
    seen: list[dict[str, torch.Tensor]] = []
    add = run_train.Meter.add

    def look(self: Any, record: StepRecord, *ranks: Any) -> Metrics | None:
        seen.append(dict(built[0].named_parameters()))
        return add(self, record, *ranks)

    monkeypatch.setattr(run_train.Meter, "add", look)
    config = settings(
        text, tmp_path / "run", max_steps=6, nonfinite="skip", max_skipped_steps=2, warmup_steps=0
    )
    run_train.train(config)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, False]  # steps 2 to 6
    lines = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] is None for line in lines] == [False, True, True, False, True, False]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert built[0].steps_done == 3
    assert capsys.readouterr().out.count("not updated") == 3


def test_steps_are_not_held_up_by_the_garbage_collector(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before the first step is frozen, and no longer when the run has ended, or failed."""
    add, frozen = run_train.Meter.add, []

    def look(self: Any, record: StepRecord, *ranks: Any) -> Metrics | None:
        frozen.append(gc.get_freeze_count())
        if record.step == 3:
            raise RuntimeError("no luck")
        return add(self, record, *ranks)

    monkeypatch.setattr(run_train.Meter, "add", look)
    monkeypatch.setattr(heap, "gc", gc)  # tests have another one
    run_train.train(settings(text, tmp_path / "run", max_steps=2))
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="no luck"):
        run_train.train(settings(text, tmp_path / "other", max_steps=3))
    assert gc.get_freeze_count() == 0
    assert len(frozen) == 5 and min(frozen) > 100_000


def test_too_many_skipped_steps_in_a_row_end_the_run(
    text: Path, tmp_path: Path, spoil_losses: Callable[[set[int]], None]
) -> None:
    spoil_losses({1, 3, 4, 5, 6})
    config = settings(text, tmp_path / "run", max_steps=9, nonfinite="skip", max_skipped_steps=3)
    with pytest.raises(NonFiniteError, match=r"skip limit reached \(max_skipped_steps=3 in a row\)"):
        run_train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["event"] == "fault"] == [1, 3, 4, 5]
    assert (
        lines[-1]["event"] == "end" and lines[-1]["status"] == "failed" and "in a row" in lines[-1]["error"]
    )
    assert entries(tmp_path / "run") == {"config.resolved.yaml", "metrics.jsonl"}


def test_an_infinite_gradient_norm_is_a_skipped_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, norms = Updates.norm_of, iter([0.0, 0.0, math.inf])
    monkeypatch.setattr(Updates, "norm_of", lambda self, step: honest(self, step) + next(norms))
    run_train.train(settings(text, tmp_path / "run", max_steps=2, nonfinite="skip"))
    last = read_steps(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["grad_norm"] is None and last["skipped_steps"] == 1


def test_an_interrupted_run_keeps_its_metrics(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, calls = HostModel.train_step, iter(range(1, 100))

    def train_step(self: HostModel, *arguments: Any, **options: Any) -> TrainStepOutput:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(HostModel, "train_step", train_step)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 130
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "end"]
    assert lines[-1]["status"] == "interrupted"
    assert "the metrics so far" in capsys.readouterr().out
