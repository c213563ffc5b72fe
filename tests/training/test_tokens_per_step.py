"""Steps by tokens: how they are cut, and what `auto` chooses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_helpers import write_rows
from epoch_runs import header_of, run_of
from epoch_runs import text as text
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, DoesNotFitError, StoppedError
from horizon_lm.plan.space import Space
from horizon_lm.plan.step_size import CUT
from horizon_lm.report.metrics import read_steps
from horizon_lm.training import prepare
from horizon_lm.training.train import train
from small_runs import losses_of, tensors_of, values
from stopped_runs import stop_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def by_tokens(text: Path, folder: Path, **changes: Any) -> TrainConfig:
    """Steps that the planner cuts: nothing about the cut is named."""
    cut = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = values(
        text, folder, **{"tokens_per_step": 64, "max_steps": 6, "save_total_limit": None, **changes}
    )
    return TrainConfig.from_dict({k: v for k, v in given.items() if k not in cut or k in changes})


def cut_of(checkpoint: Path) -> tuple[int, int]:
    saved = json.loads((checkpoint / "manifest.json").read_text())["config"]
    return saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]


def another_machine(patch: pytest.MonkeyPatch) -> None:
    """One whose planner takes one sequence at a time, wherever that is open."""
    honest = Space.batches

    def batches(self: Space) -> list[tuple[int, int]]:
        return honest(self)[-1:]

    patch.setattr(Space, "batches", batches)


@pytest.fixture(scope="module")
def by_planner(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("by_planner") / "run"
    train(by_tokens(text, run))
    assert cut_of(run / "checkpoint-6") == (4, 1)
    return run


def test_a_cut_that_the_planner_made_stays_when_a_run_goes_on(
    by_planner: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`resume` failed: the file of the run named the default cut, which was then pinned."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StoppedError):
            train(by_tokens(text, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    written = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "per_device_train_batch_size" not in written and "gradient_accumulation_steps" not in written
    of_before = "per_device_train_batch_size: 1\ngradient_accumulation_steps: 1\n"  # as it was written then
    file = tmp_path / "old" / "config.resolved.yaml"
    file.write_text(written.replace("tokens_per_step:", of_before + "tokens_per_step:"))
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        another_machine(patch)
        for run in (tmp_path / "run", tmp_path / "old"):
            assert cli.main(["resume", str(run)]) == 0, capsys.readouterr().err
            assert cut_of(run / "checkpoint-6") == (4, 1)
            assert tensors_of(run / "checkpoint-6") == tensors_of(by_planner / "checkpoint-6")
            assert losses_of(run) == losses_of(by_planner)
        train(by_tokens(text, other))  # the control: a new run is cut otherwise there, and has other bits
    assert cut_of(other / "checkpoint-6") == (1, 4)
    assert tensors_of(other / "checkpoint-6") != tensors_of(by_planner / "checkpoint-6")


def test_rounds_of_a_step_by_tokens(text: Path, tmp_path: Path) -> None:
    train(by_tokens(text, tmp_path / "rounds", rounds=2, max_steps=2))
    batch, count = cut_of(tmp_path / "rounds" / "checkpoint-2")
    assert count % 2 == 0
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": count}
    train(by_tokens(text, tmp_path / "one", **cut, max_steps=2))
    assert losses_of(tmp_path / "rounds") == losses_of(tmp_path / "one")
    with pytest.raises(ConfigError, match="rounds=3"):
        train(by_tokens(text, tmp_path / "three", rounds=3))


def test_another_cut_is_a_change_of_results(
    by_planner: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(by_planner, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-[456]"))
    source = str(tmp_path / "run" / "checkpoint-3")
    for change, what in (
        ("per_device_train_batch_size=2", "per_device_train_batch_size was 4, is 2\n"),
        ("tokens_per_step=32", "tokens_per_step was 64, is 32\n"),
    ):
        assert cli.main(["resume", source, change]) == 2
        assert f"alter the results of the run that is resumed: {what}" in capsys.readouterr().err
    allowed = ["per_device_train_batch_size=2", "allow_changed_settings=true"]
    assert cli.main(["resume", source, *allowed]) == 0
    assert cut_of(tmp_path / "run" / "checkpoint-6") == (2, 2)


def test_auto_sizes_the_step_to_the_data(text: Path, tmp_path: Path) -> None:
    """As explicit numbers of the same size do, to the bit, and again when the run goes on."""
    changes = {"num_train_epochs": 4.0, "max_steps": -1, "save_steps": 10, "warmup_steps": 2}
    train(by_tokens(text, tmp_path / "auto", tokens_per_step="auto", **changes))
    sequences = header_of(tmp_path / "auto")["num_sequences"]
    size = sequences // 13  # 13 steps in each of 4 epochs are about 50
    count = header_of(tmp_path / "auto")["num_steps"]
    assert size > 1 and count == 4 * -(-sequences // size)
    cut = dict(zip(CUT, (size, 1), strict=True))
    train(run_of(text, tmp_path / "named", **{**changes, **cut, "save_strategy": "steps"}))
    last = f"checkpoint-{count}"
    assert cut_of(tmp_path / "auto" / last) == (size, 1)
    assert tensors_of(tmp_path / "auto" / last) == tensors_of(tmp_path / "named" / last)
    shutil.copytree(tmp_path / "auto", tmp_path / "again", ignore=shutil.ignore_patterns(f"{last}*"))
    with pytest.MonkeyPatch.context() as patch:
        another_machine(patch)
        assert cli.main(["resume", str(tmp_path / "again" / "checkpoint-10")]) == 0
    assert tensors_of(tmp_path / "again" / last) == tensors_of(tmp_path / "auto" / last)


def test_a_step_by_tokens_is_at_most_an_epoch(text: Path, tmp_path: Path) -> None:
    large = by_tokens(text, tmp_path / "run", tokens_per_step=37 * 16, num_train_epochs=2.0, max_steps=-1)
    train(large)
    sequences = header_of(tmp_path / "run")["num_sequences"]
    assert header_of(tmp_path / "run")["plan"]["tokens_per_step"] == 16 * sequences
    notes = " ".join(header_of(tmp_path / "run")["notes"])
    assert f"tokens_per_step=592 is more than the data ({sequences} sequences of 16)" in notes
    assert math.prod(cut_of(tmp_path / "run" / "checkpoint-2")) == sequences
    pinned = large.replace(output_dir=str(tmp_path / "p")).to_dict() | {
        "per_device_train_batch_size": 8,
        "tokens_per_step": 640,
    }
    del pinned["gradient_accumulation_steps"]
    train(TrainConfig.from_dict(pinned))
    assert cut_of(tmp_path / "p" / "checkpoint-2") == (8, -(-sequences // 8))
    whole = {"tokens_per_step": 16 * sequences, "per_device_train_batch_size": sequences}
    train(by_tokens(text, tmp_path / "whole", max_steps=1, **whole))  # the control
    assert "more than the data" not in " ".join(header_of(tmp_path / "whole")["notes"])


def test_steps_by_tokens_are_refused_before_the_data_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_machine(monkeypatch)  # it looks at one cut alone, and is quick
    read = []
    honest = prepare.load_training_data
    monkeypatch.setattr(prepare, "load_training_data", lambda config: read.append(1) or honest(config))
    with pytest.raises(DoesNotFitError):
        train(by_tokens(text, tmp_path / "run", reserve_host_gb=1e6))
    assert not read
    with pytest.raises(DoesNotFitError):  # the control: here the data decides
        train(by_tokens(text, tmp_path / "run", tokens_per_step="auto", reserve_host_gb=1e6))
    assert read


def test_auto_of_a_stream_and_of_a_plan(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": line} for line in text.read_text().splitlines()])
    changes = {"streaming": True, "buffer_size": 10, "max_steps": 2, "max_length": 64}
    changes["per_device_train_batch_size"] = 256  # one cut alone, which is quick to plan
    train(by_tokens(rows, tmp_path / "run", tokens_per_step="auto", **changes))
    assert math.prod(cut_of(tmp_path / "run" / "checkpoint-2")) == 65536 // 64
    capsys.readouterr()
    file = tmp_path / "plan.yaml"
    for path, tokens, command in (
        (text, 65536, ["plan", str(file)]),
        (rows, 16384, ["train", str(file), "--dry-run"]),
    ):
        cut = {"tokens_per_step": "auto", "per_device_train_batch_size": 1024}
        file.write_text(by_tokens(path, tmp_path / "new", **cut).to_yaml())
        assert cli.main(command) == 0
        shown = capsys.readouterr().out
        assert f"tokens_per_step=auto: the data was not read; {tokens:,} tokens per step" in shown
    assert cli.main(["data", "preview", str(file)]) == 0
    assert "an epoch     1 step of " in capsys.readouterr().out  # not one sequence a step


def test_a_curve_that_misses_its_peak_is_remarked_on(text: Path, tmp_path: Path) -> None:
    for decay, is_short in ((7, True), (6, False)):
        run = tmp_path / str(decay)
        curve = {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": decay}}
        train(run_of(text, run, max_steps=8, warmup_steps=2, **curve))
        rates = [line["learning_rate"] for line in read_steps(run / "metrics.jsonl")]
        notes = header_of(run)["notes"]
        assert (max(rates) < 5e-3) == is_short == bool(notes)
        expected = (
            "warmup_steps=2 and num_decay_steps=7 together are more than 8 steps: the learning rate only"
        )
        assert not notes or notes[0].startswith(expected)
