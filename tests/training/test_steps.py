"""The steps of a run: epochs asked are epochs trained, and small data trains."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import horizon_lm as hz
from data_helpers import write_rows
from epoch_runs import header_of, run_of
from epoch_runs import text as text
from horizon_lm import cli
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.data import StreamLoader, TokenLoader, train_tokenizer
from horizon_lm.errors import StoppedError
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.training.train import train
from small_runs import LLAMA, losses_of, place_of, tensors_of
from stopped_runs import stop_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[bytes]]]:
    """The rows of each step that the loader gave out."""
    steps: list[list[bytes]] = []
    honest = TokenLoader.__next__

    def remember(self: TokenLoader) -> Any:
        batches = honest(self)
        steps.append([row.numpy().tobytes() for b in batches for row in b["input_ids"]])
        return batches

    monkeypatch.setattr(TokenLoader, "__next__", remember)
    yield steps


# ---- from init to a model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model's folder, 60 chats)."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n + 1}?"},
                {"role": "assistant", "content": f"It is {2 * n + 1}, as {n} and {n + 1} make {2 * n + 1}."},
            ]
        }
        for n in range(60)
    ]
    write_rows(folder / "chats.jsonl", rows)
    tokenizer = train_tokenizer((json.dumps(row) for row in rows), 320)
    values = {**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    plain = ModelSettings(device="cpu", dtype="float32", reserve_host_gb=0.0)
    hz.HostModel.from_config(values, plain).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "chats.jsonl"


def test_init_then_train_trains(
    chats: tuple[Path, Path], tmp_path: Path, given: list[list[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The case of the issue: 60 chats were one step at a learning rate of 0, 9.14 epochs of 3."""
    model, rows = chats
    file = tmp_path / "run.yaml"
    assert cli.main(["init", "--model", str(model), "--dataset", str(rows), "-o", str(file)]) == 0
    said = capsys.readouterr().out
    # A run's model is named after the run; all of them lie in folders called "model".
    assert TrainConfig.from_yaml(file).output_dir == f"runs/{model.parent.name}-tuned"
    more = ["device=cpu", "dtype=float32", "reserve_host_gb=0", f"output_dir={tmp_path / 'run'}"]
    more += ["dataset_cache_dir=null", "peak_tflops=1", "plot_loss=false", "learning_rate=1e-3"]
    assert cli.main(["train", str(file), *more]) == 0
    shown = capsys.readouterr().out
    try_it = f"horizon chat {tmp_path / 'run'}"
    assert (try_it in shown) == (tmp_path / "run" / "model" / "chat_template.jinja").exists()
    assert try_it in shown or f"horizon generate {tmp_path / 'run'} --prompt" in shown
    steps = read_steps(tmp_path / "run" / "metrics.jsonl")
    sequences = header_of(tmp_path / "run")["num_sequences"]
    length = TrainConfig.from_yaml(file).max_length
    expected = (
        f"60 chats = {sequences} sequences of {length}; 3 epochs are {3 * sequences} steps of 1 sequence"
    )
    assert expected in said and len(steps) == 3 * sequences >= 10
    assert steps[-1]["epoch"] == 3.0 and sum(line["learning_rate"] > 0 for line in steps) >= len(steps) - 1
    assert set(Counter(row for step in given for row in step).values()) == {3}
    before = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto").state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_init_keeps_the_steps_of_large_data() -> None:
    from horizon_lm.cli.init import _batch

    large = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    chat, text = ({"is_chat": is_chat, "kind": "documents"} for is_chat in (True, False))
    for sequences in (None, 100_000, 32 * 17):
        assert _batch(512, sequences, chat) | large == _batch(512, sequences, chat)
    for sequences in range(1, 2000, 7):  # about 50 steps or more, where there are so many sequences
        for seen in (chat, text):
            found = _batch(512, sequences, seen)
            size = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
            steps = found["num_train_epochs"] * -(-sequences // size)
            assert size == 1 or steps >= 50


# ---- epochs ---------------------------------------------------------------------------------


def test_three_epochs_are_three_of_every_row(text: Path, tmp_path: Path, given: list[list[bytes]]) -> None:
    changes = {"num_train_epochs": 3.0, "val_size": 0, "eval_datasets": str(text), "eval_strategy": "epoch"}
    config = run_of(text, tmp_path / "run", save_strategy="epoch", **changes)
    result = train(config)
    sequences = header_of(tmp_path / "run")["num_sequences"]
    an_epoch = -(-sequences // 8)
    assert sequences % 8 and result.num_steps == 3 * an_epoch
    steps = read_steps(result.metrics_path)
    assert [line["epoch"] for line in steps][an_epoch - 1 :: an_epoch] == [1.0, 2.0, 3.0]
    assert [len(step) for step in given] == 3 * [*[8] * (an_epoch - 1), sequences % 8]
    assert set(Counter(row for step in given for row in step).values()) == {3}
    assert all(len(set(step)) == len(step) for step in given)
    borders = [an_epoch, 2 * an_epoch, 3 * an_epoch]
    assert [line["step"] for line in read_evaluations(result.metrics_path)] == borders
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == borders


def test_a_step_larger_than_the_data_is_an_epoch(
    text: Path, tmp_path: Path, given: list[list[bytes]]
) -> None:
    """1000 a step gave each row 30 times a step; as 125 micro-batches of 8, and by tokens_per_step."""
    weights = []
    for number, cut in enumerate(({"gradient_accumulation_steps": 125}, {"gradient_accumulation_steps": 9})):
        run = tmp_path / str(number)
        changes = {"per_device_train_batch_size": 8, **cut, "num_train_epochs": 2.0, "warmup_steps": 0}
        result = train(run_of(text, run, save_strategy="steps", **changes))
        assert result.num_steps == 2 and read_steps(result.metrics_path)[-1]["epoch"] == 2.0
        notes = " ".join(header_of(run)["notes"])
        assert "larger than the data" in notes and "only 2 optimizer steps" in notes
        weights.append(tensors_of(run / "checkpoint-2"))
    assert weights[0] == weights[1]  # what is beyond the data computes nothing
    assert set(Counter(row for step in given for row in step).values()) == {4}  # two runs of two epochs


def test_a_run_of_one_step_trains_at_the_peak(text: Path, tmp_path: Path) -> None:
    config = run_of(text, tmp_path / "run", max_steps=1, warmup_steps=100, save_strategy="steps")
    result = train(config)
    (step,) = read_steps(result.metrics_path)
    assert step["learning_rate"] == config.learning_rate
    notes = header_of(tmp_path / "run")["notes"]
    assert notes == [
        "warmup_steps=100 is too long for a run of 1 step: 0 used, so that learning_rate is reached"
    ]


# ---- going on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run_of(text, run, num_train_epochs=2.5, save_strategy="steps"))
    return run


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_cut_at_any_step_of_several_epochs_changes_no_bit(
    cut: int, straight: Path, text: Path, tmp_path: Path
) -> None:
    count = header_of(straight)["num_steps"]
    assert count >= 10 and header_of(straight)["num_sequences"] % 8  # there are smaller steps
    source = straight / f"checkpoint-{cut}"
    config = run_of(
        text,
        tmp_path / "run",
        num_train_epochs=2.5,
        save_strategy="steps",
        save_steps=count,
        resume_from_checkpoint=str(source),
    )
    train(config)
    last = f"checkpoint-{count}"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(straight / last)
    assert place_of(tmp_path / "run" / last) == place_of(straight / last)
    assert losses_of(tmp_path / "run") == losses_of(straight)[cut:]


@pytest.mark.parametrize("micro_batches", [1, 2, 3])  # 2: as before, the control
def test_epochs_asked_are_epochs_trained_after_another_batch_size(
    micro_batches: int, straight: Path, text: Path, tmp_path: Path
) -> None:
    """Steps were counted from the beginning as if all of them had the new size. Cut once more, on the way."""
    sequences, run = header_of(straight)["num_sequences"], tmp_path / "run"
    changes = {
        "num_train_epochs": 2.5,
        "save_strategy": "steps",
        "gradient_accumulation_steps": micro_batches,
    }
    source = straight / "checkpoint-3"
    others = {"resume_from_checkpoint": str(source), "allow_changed_settings": True, "save_steps": 2}
    result = train(run_of(text, run, **{**changes, **others}))
    last = read_steps(result.metrics_path)[-1]
    rows = round(2.5 * sequences + 1e-9)
    assert last["step"] == result.num_steps and last["epoch"] == pytest.approx(rows / sequences)
    assert micro_batches != 2 or result.num_steps == header_of(straight)["num_steps"]
    again = run_of(text, tmp_path / "again", **changes, resume_from_checkpoint=str(run / "checkpoint-4"))
    assert train(again).num_steps == result.num_steps
    assert losses_of(tmp_path / "again") == losses_of(run)[1:]


def as_before(patch: pytest.MonkeyPatch, kind: type) -> None:
    """Loaders begin, and save their place, as versions before this rule did."""
    make, state = kind.__init__, kind.state_dict  # type: ignore[misc]

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.crosses_epochs = True

    def state_dict(self: Any) -> dict[str, Any]:
        return {key: value for key, value in state(self).items() if key != "crosses_epochs"}

    patch.setattr(kind, "__init__", __init__)
    patch.setattr(kind, "state_dict", state_dict)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_of_before_goes_on_with_its_steps_and_bits(streaming: bool, text: Path, tmp_path: Path) -> None:
    """Steps across the border, the count of steps and the warmup of then; tests/data/test_loader.py compares
    the order with one that is computed there."""
    kind: type = StreamLoader if streaming else TokenLoader
    changes: dict[str, Any] = {"num_train_epochs": 2.5, "warmup_steps": 100, "save_strategy": "steps"}
    if streaming:
        lines = text.read_text().splitlines()
        text = write_rows(tmp_path / "rows.jsonl", [{"text": line} for line in lines])
        changes |= {"streaming": True, "buffer_size": 10, "max_steps": 12}
    with pytest.MonkeyPatch.context() as patch:
        as_before(patch, kind)
        train(run_of(text, tmp_path / "straight", **changes))
        stop_at(patch, 4)
        with pytest.raises(StoppedError):
            train(run_of(text, tmp_path / "run", **changes))
    count = header_of(tmp_path / "straight")["num_steps"]
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    one, two = (tmp_path / name / f"checkpoint-{count}" for name in ("straight", "run"))
    assert tensors_of(one) == tensors_of(two)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")
    rates = [line["learning_rate"] for line in read_steps(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [5e-3 * step / 100 for step in range(count)]  # all of it warmup, as it was
    train(run_of(text, tmp_path / "now", **changes))  # the control
    assert losses_of(tmp_path / "now") != losses_of(tmp_path / "straight")
