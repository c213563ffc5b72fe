"""The steps of a run: epochs asked are epochs trained, small data trains, and smaller steps are exact."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import horizon_lm as hz
import zoo
from data_helpers import write_rows
from horizon_lm import cli
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.data import StreamLoader, TokenLoader, train_tokenizer
from horizon_lm.errors import DoesNotFitError, StoppedError
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.step_size import CUT
from horizon_lm.run import planning
from horizon_lm.run.metrics import read_evaluations, read_steps
from horizon_lm.run.train import train
from small_runs import LLAMA, losses_of, place_of, settings, tensors_of, values, write_text
from test_resume import stop_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30 sequences of 16 tokens, so that 4 x 2 a step leave a smaller last step."""
    return write_text(tmp_path_factory.mktemp("data") / "text.txt", sentences=36)


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


def run_of(text: Path, folder: Path, **changes: Any) -> TrainConfig:
    base = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": -1}
    return settings(text, folder, **{**base, "save_strategy": "no", **changes})


def header_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))


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
    more = ["device=cpu", "dtype=float32", "reserve_host_gb=0", f"output_dir={tmp_path / 'run'}"]
    more += ["dataset_cache_dir=null", "peak_tflops=1", "plot_loss=false", "learning_rate=1e-3"]
    assert cli.main(["train", str(file), *more]) == 0
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
    from horizon_lm.run.init_config import _batch

    large = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    for sequences in (None, 100_000, 32 * 17):
        assert _batch(512, sequences, is_text=False) | large == _batch(512, sequences, is_text=False)
    for sequences in range(1, 2000, 7):  # about 50 steps or more, where there are so many sequences
        for is_text in (False, True):
            found = _batch(512, sequences, is_text=is_text)
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


# ---- tokens_per_step ------------------------------------------------------------------------


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
    honest = Planner.batches

    def batches(self: Planner, config: TrainConfig) -> list[tuple[int, int]]:
        return honest(self, config)[-1:]

    patch.setattr(Planner, "batches", batches)


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
    honest = planning.load_training_data
    monkeypatch.setattr(planning, "load_training_data", lambda config: read.append(1) or honest(config))
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
        assert f"tokens_per_step=auto: the data was not read; {tokens:,} tokens a step" in shown
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


# ---- the engine -----------------------------------------------------------------------------

SHAPES = [[3, 3, 3], [3, 2], [1], [3, 3, 3], [2, 3, 1]]  # rows of the micro-batches of each step


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    found = []
    for rows in SHAPES[step]:
        ids = torch.randint(0, 96, (rows, 12), generator=generator)
        labels = ids.clone()
        labels[:, : 2 + rows] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def weights_after(**options: Any) -> dict[str, torch.Tensor]:
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32", **options)
    for step in range(len(SHAPES)):
        model.train_step(micro_batches(step), lr=1e-3)
    return dict(model.named_parameters())


WAYS: list[dict[str, Any]] = [
    {"update": "deferred"},
    {"update": "eager", "grad_slabs": 1},
    {"activations": "keep"},
    {"activations": "recompute", "boundaries": "host", "lanes": "adversarial"},
    {"boundaries": "host", "boundary_slots": 1, "slots": 3, "lanes": "adversarial", "update": "deferred"},
    {"checkpoint_interval": 2, "activations": "recompute", "lanes": "adversarial"},
    {"activations": "keep", "lanes": "adversarial", "update": "eager"},
]


def test_steps_of_changing_size_have_the_same_bits_in_every_mode() -> None:
    free = {"max_grad_norm": None}  # eager updates do not clip
    expected = weights_after(update="sync", activations="recompute", **free)
    for way in WAYS:
        found = weights_after(**{**free, **way})
        assert all(torch.equal(found[name], value) for name, value in expected.items()), way


@pytest.mark.parametrize("options", [{}, WAYS[3], WAYS[5]], ids=["plain", "adversarial", "blocks"])
def test_a_smaller_step_has_the_gradients_of_pytorch(options: dict[str, Any]) -> None:
    """After a full step, whose buffers it takes over: fewer micro-batches, the last with fewer rows."""
    reference = zoo.build("llama").float()
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32", **options)
    for step in (0, 1, 4):
        model.forward_backward(micro_batches(step))
        reference.zero_grad()
        batches = micro_batches(step)
        whole = {name: torch.cat([b[name] for b in batches]) for name in ("input_ids", "labels")}
        reference(**whole).loss.backward()
        for name, gradient in model.named_gradients():
            expected = reference.get_parameter(name).grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # sums in another order
    wrong = dict(model.named_gradients())["model.layers.0.mlp.up_proj.weight"] * 1.01  # the control
    assert not torch.allclose(
        wrong, reference.get_parameter("model.layers.0.mlp.up_proj.weight").grad, rtol=1e-4, atol=1e-6
    )
