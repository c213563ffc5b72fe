"""Checkpoints of Trainers: files, resuming, rotation, the best model, failures.

The authority is the Trainer of transformers itself, on the same evaluations.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from horizon_lm import cli
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import RunFolder, open_checkpoint
from horizon_lm.checkpoint.reader import verify
from horizon_lm.errors import CheckpointError, ConfigError, DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.trainers import HorizonTrainer, checkpoints, trainer_state
from horizon_lm.training.resume import find
from horizon_lm.training.together import Together
from saved_models import new_model, save
from small_runs import settings
from trainer_runs import digests, history, make, model_folder, texts, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class StopAt(TrainerCallback):
    def __init__(self, step: int, error: type[BaseException] | None = None) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True
        return control


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is warned of."""
    found: list[str] = []
    monkeypatch.setattr(checkpoints._log, "warning", lambda text, *_: found.append(text))
    return found


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each checkpoint was written during the next steps."""
    found: list[bool] = []
    honest = HostModel.save_state

    def save_state(self: HostModel, saving: Any, *, background: bool = False, **more: Any) -> None:
        found.append(background)
        honest(self, saving, background=background, **more)

    monkeypatch.setattr(HostModel, "save_state", save_state)
    return found


class Straight:
    """A run of 10 steps with a checkpoint after each, written meanwhile."""

    def __init__(self, kind: str, model: Path, run: Path, **changes: Any) -> None:
        self.kind, self.model, self.run, self.changes = kind, model, run, changes
        trainer = make(kind, model, run, **{**changes, "save_steps": 1})
        trainer.train()
        self.digests, self.history = digests(trainer.host), history(trainer)

    def copy(self, target: Path, *steps: int) -> Path:
        for step in steps:
            shutil.copytree(self.run / f"checkpoint-{step}", target / f"checkpoint-{step}")
        return target

    def resumed(self, run: Path, source: bool | str, **changes: Any) -> Any:
        trainer = make(self.kind, self.model, run, **{**self.changes, **changes})
        trainer.train(resume_from_checkpoint=source)
        return trainer


@pytest.fixture(scope="module")
def sft(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Logged every third step, so that the checkpoint falls between two lines of the log."""
    return Straight("sft", model, tmp_path_factory.mktemp("runs") / "sft", logging_steps=3)


@pytest.fixture(scope="module")
def dpo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight("dpo", model, tmp_path_factory.mktemp("runs") / "dpo")


@pytest.fixture(scope="module")
def grpo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight("grpo", model, tmp_path_factory.mktemp("runs") / "grpo", max_steps=6)


# Resuming.


def test_five_steps_and_five_more_are_ten(sft: Straight, tmp_path: Path, background: list[bool]) -> None:
    first = make("sft", sft.model, tmp_path, **sft.changes)
    first.add_callback(StopAt(5))
    first.train()
    assert background == [False]  # the last one is there when train() returns
    again = sft.resumed(tmp_path, True)
    assert digests(again.host) == sft.digests
    assert history(again)[-3:] == sft.history[-3:]  # steps 6 and 9; the summary
    assert again.host.steps_done == 10 and sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-5",
    ]


@pytest.mark.parametrize(("kind", "step"), [("sft", 5), ("sft", 7), ("dpo", 4), ("grpo", 3)])
def test_a_checkpoint_written_meanwhile_resumes_bit_for_bit(
    kind: str, step: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In the middle of an epoch, between two (step 7, of a single micro-batch), and while completions of GRPO
    are left to train on, which TRL generates anew."""
    straight: Straight = request.getfixturevalue(kind)
    again = straight.resumed(tmp_path, str(straight.run / f"checkpoint-{step}"))
    assert digests(again.host) == straight.digests
    assert history(again) == straight.history
    tokens = [line["num_tokens"] for line in history(again) if "num_tokens" in line]
    assert tokens == sorted(set(tokens))  # TRL alone begins to count again


@pytest.mark.parametrize("left_out", ["restore_schedule", "restore_progress"])
def test_what_is_not_restored_shows(
    left_out: str, sft: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, left_out, lambda trainer, state: None)
    again = sft.resumed(tmp_path, str(sft.run / "checkpoint-5"))
    if left_out == "restore_schedule":
        assert digests(again.host) != sft.digests
    else:
        assert history(again) != sft.history


def test_random_states_of_the_checkpoint_return(sft: Straight, tmp_path: Path) -> None:
    """Of Python, numpy and torch, as at the end of step 5."""
    device = torch.device("cpu")
    state = trainer_state.load_state(open_checkpoint(sft.run / "checkpoint-5"), device)
    trainer_state._restore_random(state["random"], device)
    one = _plain(trainer_state._random_states(device))
    assert one == _plain(state["random"])
    torch.rand(3), random.random(), np.random.rand(700)
    other = _plain(trainer_state._random_states(device))
    trainer_state._restore_random(state["random"], device)
    assert _plain(trainer_state._random_states(device)) == one
    assert all(one[name] != other[name] for name in ("python", "numpy", "cpu"))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def test_callbacks_go_on(model: Path, tmp_path: Path) -> None:
    """Patience is counted across a resume if the arguments ask for it, as in Trainer."""
    ended = {}
    for restores in (True, False):
        run = tmp_path / str(restores)
        losses = {1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0}
        for resumes, stop in ((None, 3), (True, 99)):
            trainer = scripted(
                run,
                losses,
                model,
                save_steps=1,
                max_steps=6,
                restore_callback_states_from_checkpoint=restores,
                callbacks=[EarlyStoppingCallback(early_stopping_patience=3), StopAt(stop)],
            )
            trainer.train(resume_from_checkpoint=resumes)
        ended[restores] = trainer.state.global_step
    assert ended == {True: 4, False: 6}


def test_skipping_no_data_is_left_to_the_arguments(sft: Straight, tmp_path: Path) -> None:
    again = sft.resumed(tmp_path, str(sft.run / "checkpoint-5"), ignore_data_skip=True)
    assert again.state.global_step == 10 and digests(again.host) != sft.digests


# Files.


def test_a_checkpoint_holds_no_pickle_and_no_secret(model: Path, tmp_path: Path) -> None:
    trainer = make("sft", model, tmp_path / "run", max_steps=2, save_steps=1, hub_token="hf_secret")
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    names = {p.name for p in folder.iterdir()}
    assert {*trainer_state.TRAINER_FILES, "manifest.json", "tokenizer.json", "config.json"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}
    assert not any(b"hf_secret" in p.read_bytes() for p in folder.iterdir())
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 1e-2
    assert not verify(open_checkpoint(folder)).faults
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert not {p.name for p in (tmp_path / "out").iterdir()} & set(trainer_state.TRAINER_FILES)
    assert_is_the_model(tmp_path / "out", trainer.host)


def assert_is_the_model(folder: Path, host: HostModel) -> None:
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, value in host.named_parameters():
        assert torch.equal(loaded[name], value), name


def test_a_saved_model_is_a_folder_of_hugging_face(model: Path, tmp_path: Path) -> None:
    """Also beside the checkpoints in output_dir, twice, and in a folder with files of others."""
    run = tmp_path / "run"
    trainer = make("sft", model, run, max_steps=2, save_steps=1)
    trainer.train()
    (run / "notes.txt").write_text("mine")
    for target in (tmp_path / "new", run, run):
        trainer.save_model(str(target) if target != run else None)
        assert_is_the_model(target, trainer.host)
        assert {"tokenizer.json", "training_args.json"} <= {p.name for p in target.iterdir()}
    (run / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier, sharded save")
    (run / "model.safetensors.index.json").write_text("{}")
    trainer.save_model()
    assert_is_the_model(run, trainer.host)
    names = {p.name for p in run.iterdir()}
    assert {"notes.txt", "checkpoint-1", "checkpoint-2"} <= names and not list(run.glob("*.bin"))
    assert not [name for name in names if name.startswith((".", "model-", "model.safetensors.index"))]
    trainer.save_state()  # a trainer_state.json beside the model
    trainer = make("sft", model, run, max_steps=3, save_steps=1)
    trainer.train(resume_from_checkpoint="True")  # as from a command line
    assert trainer.host.steps_done == 3


def test_what_reads_a_checkpoint_finds_it(model: Path, tmp_path: Path, background: list[bool]) -> None:
    """A callback that wants the files gets them at once; without one they are written meanwhile."""

    class Reads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert (tmp_path / "b" / f"checkpoint-{state.global_step}" / "manifest.json").is_file()

    make("sft", model, tmp_path / "a", max_steps=3, save_steps=1).train()
    assert background == [True, True, False]
    background.clear()
    trainer = make("sft", model, tmp_path / "b", max_steps=3, save_steps=1)
    trainer.add_callback(Reads())
    trainer.train()
    assert background == [False] * 3


# What Trainer decides: when to save, what to keep, which one is best.


def scripted(run: Path, losses: dict[int, float], model: Path | None = None, **changes: Any) -> Any:
    """A trainer whose evaluation after a step gives a loss from a list; the one of transformers without a
    model folder."""
    callbacks = changes.pop("callbacks", [])
    values = {
        "output_dir": str(run),
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_steps": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        **changes,
    }
    tok = tokenizer()
    rows = [
        {"input_ids": (ids := tok(one)["input_ids"][:4] + [1] * 4), "labels": ids} for one in texts()["text"]
    ]
    rows = [{key: value[:6] for key, value in row.items()} for row in rows]
    base: Any = HorizonTrainer if model is not None else Trainer

    class Scripted(base):  # type: ignore[misc]
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": losses[self.state.global_step]}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = TrainingArguments(**values)
    source = str(model) if model is not None else plain_model()
    return Scripted(source, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=callbacks)


def plain_model() -> Any:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=63, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    return AutoModelForCausalLM.from_config(config)


DOWN_AND_UP = {1: 5.0, 2: 4.0, 3: 3.5, 4: 3.0, 5: 3.2, 6: 3.3, 7: 3.4, 8: 3.6}
CASES: dict[str, dict[str, Any]] = {
    "limit 1": {"save_total_limit": 1},
    "limit 2": {"save_total_limit": 2},
    "limit 3": {"save_total_limit": 3},
    "no best": {"save_total_limit": 2, "load_best_model_at_end": False, "metric_for_best_model": None},
    "best alone": {"save_strategy": "best", "save_total_limit": 1},
    "epochs": {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_total_limit": 2,
        "max_steps": -1,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 13,
    },
    "early": {"save_steps": 1, "save_total_limit": 2, "callbacks": 2},
    "model alone": {"save_only_model": True, "save_total_limit": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_keeps_and_loads_the_same_ones(case: str, model: Path, tmp_path: Path) -> None:
    found = {}
    for place in (None, model):
        run = tmp_path / ("ours" if place else "theirs")
        changes = dict(CASES[case])
        patience = changes.pop("callbacks", 0)
        weights: dict[int, dict[str, torch.Tensor]] = {}
        made: list[Any] = []

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                host = getattr(made[-1], "host", None)  # noqa: B023
                if host is not None:
                    weights[state.global_step] = dict(host.named_parameters())  # noqa: B023

        more = [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []
        trainer = scripted(run, DOWN_AND_UP, place, callbacks=[Look(), *more], **changes)
        made.append(trainer)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        kept = sorted(p.name for p in run.glob("checkpoint-*"))
        name = None if best is None else str(Path(best).relative_to(run))
        found[place] = (kept, name, trainer.state.global_step, trainer.state.best_metric)
        if place is not None and name is not None:
            expected = weights[int(name.split("-")[1])]
            now = dict(trainer.host.named_parameters())
            assert all(torch.equal(now[key], value) for key, value in expected.items())
            last = weights[trainer.state.global_step]
            assert any(not torch.equal(now[key], value) for key, value in last.items())
    assert found[None] == found[model]


def test_a_model_alone_is_not_resumed(model: Path, tmp_path: Path) -> None:
    trainer = make("sft", model, tmp_path / "run", max_steps=2, save_steps=1, save_only_model=True)
    trainer.train()
    assert_is_the_model(tmp_path / "run" / "checkpoint-2", trainer.host)
    assert (
        json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
    )
    for source in (True, str(tmp_path / "run" / "checkpoint-2")):
        with pytest.raises(
            CheckpointError, match=r"checkpoint-2 holds a model without .*save_only_model"
        ) as info:
            trainer.train(resume_from_checkpoint=source)
        assert "as the trainer's model" in str(info.value.hint)


# What cannot be resumed.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["unit-00001.safetensors", "trainer.json", "trainer.safetensors", "tokenizer.json"]
)
def test_a_damaged_checkpoint_is_found_by_its_hash(
    name: str, sft: Straight, tmp_path: Path, warned: list[str]
) -> None:
    run = sft.copy(tmp_path / "run", 5, 10)
    damaged = run / "checkpoint-10" / name
    flip(damaged)
    trainer = make("sft", sft.model, run, **{**sft.changes, "max_steps": 6, "save_strategy": "no"})
    with pytest.raises(CheckpointError, match=f"{damaged}: corrupt"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-10"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.host.steps_done == trainer.state.global_step == 6
    assert any(f"skipped {damaged}" in text for text in warned)


def test_the_damaged_checkpoint_is_replaced(sft: Straight, tmp_path: Path) -> None:
    run = sft.copy(tmp_path / "run", 5, 10)
    (run / "checkpoint-10" / "unit-00001.safetensors").unlink()
    again = sft.resumed(run, True)
    assert digests(again.host) == sft.digests and not verify(open_checkpoint(run / "checkpoint-10")).faults
    names = {p.name for p in run.iterdir()} - {"README.md"}
    assert names == {f"checkpoint-{step}" for step in range(5, 11)}  # every step, as the resumed run did


def test_all_damaged(sft: Straight, tmp_path: Path) -> None:
    run = sft.copy(tmp_path / "run", 5, 10)
    for step in (5, 10):
        flip(run / f"checkpoint-{step}" / "unit-00000.safetensors")
    with pytest.raises(CheckpointError, match="no valid checkpoint in .*corrupt.*corrupt"):
        sft.resumed(run, True)


def test_a_checkpoint_of_trainer_itself_is_refused(model: Path, tmp_path: Path) -> None:
    plain = scripted(tmp_path / "plain", DOWN_AND_UP, None, max_steps=2)
    plain.train()
    for source in (True, str(tmp_path / "plain" / "checkpoint-2")):
        trainer = make("sft", model, tmp_path / "plain")
        with pytest.raises(
            CheckpointError, match=r"checkpoint-2 is a checkpoint of .*optimizer\.pt is a pickle"
        ) as i:
            trainer.train(resume_from_checkpoint=source)
        assert f"pass {tmp_path / 'plain' / 'checkpoint-2'} as the trainer's model" in str(i.value.hint)
    trainer = make("sft", model, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_and_a_trainer_refuse_each_others(sft: Straight, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", new_model(), 1)
    with pytest.raises(CheckpointError, match="is a checkpoint of `horizon train`, not of a Trainer"):
        sft.resumed(tmp_path / "run", str(tmp_path / "run" / "checkpoint-1"))
    config = settings(tmp_path / "text", tmp_path / "other", resume_from_checkpoint=str(sft.run))
    with pytest.raises(CheckpointError, match="checkpoint-10 is a checkpoint of HorizonSFTTrainer"):
        find(config, RunFolder(tmp_path / "other"), print, Together())
    assert cli.main(["resume", str(sft.run)]) == 5
    assert "trainer.train(resume_from_checkpoint=True)" in capsys.readouterr().err


def test_two_trainers_in_one_folder(sft: Straight, tmp_path: Path) -> None:
    class Another(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            with pytest.raises(ConfigError, match="in use by another run"):
                make("sft", sft.model, tmp_path).train()

    trainer = make("sft", sft.model, tmp_path, max_steps=1)
    trainer.add_callback(Another())
    trainer.train()
    assert trainer.state.global_step == 1


def test_state_that_json_cannot_hold(model: Path, tmp_path: Path) -> None:
    trainer = make("sft", model, tmp_path, max_steps=1)
    trainer._metrics["train"]["odd"] = [object()]
    with pytest.raises(ConfigError, match=r"carried\._metrics\.train\.odd\.0 is a object"):
        trainer_state._pack({"_metrics": trainer._metrics}, "carried", {})


# Disks and interrupts.


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the disk full for the checkpoints of some steps."""
    steps: set[int] = set()

    def before(self: Disk, what: str, path: Path) -> None:
        if what == "write" and any(f"checkpoint-{step}/" in str(path) for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Disk, "before", before)
    yield lambda *some: steps.update(some)


def test_a_full_disk_keeps_the_checkpoint_before(
    model: Path, tmp_path: Path, full: Callable[..., None], warned: list[str]
) -> None:
    full(2, 3, 4)
    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: 1.5}
    trainer = scripted(tmp_path, losses, model, save_steps=1, max_steps=4, save_total_limit=1)
    trainer.train()
    assert [p.name for p in tmp_path.iterdir() if p.name != "README.md"] == ["checkpoint-1"]
    assert sum("could not be saved: No space left on device" in text for text in warned) == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert not verify(open_checkpoint(tmp_path / "checkpoint-1")).faults
    again = scripted(tmp_path, losses, model, max_steps=2, load_best_model_at_end=False)
    again.train(resume_from_checkpoint=True)
    assert again.host.steps_done == 2


def test_a_disk_that_stays_full_ends_the_run(model: Path, tmp_path: Path, full: Callable[..., None]) -> None:
    full(*range(2, 9))
    trainer = make("sft", model, tmp_path, save_steps=1)
    with pytest.raises(
        DoesNotFitError, match="4 checkpoints in a row could not be saved; the last: No space"
    ):
        trainer.train()
    assert trainer.host.steps_done in (5, 6) and (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_and_the_checkpoints(
    error: type[BaseException], sft: Straight, tmp_path: Path
) -> None:
    """While a checkpoint is being written; in the same process the run goes on from what is there."""
    trainer = make("sft", sft.model, tmp_path, **{**sft.changes, "save_steps": 2})
    trainer.add_callback(StopAt(5, error))
    with pytest.raises(error):
        trainer.train()
    trainer.host.evaluate([{"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}])
    trainer.remove_callback(StopAt)
    trainer.train(resume_from_checkpoint=True)
    assert digests(trainer.host) == sft.digests


# The Hub.


def test_pushes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[Any, ...]] = []

    class Job:
        def done(self) -> bool:
            return True

        def result(self) -> None: ...

    def upload(self: Any, *, folder_path: str, **more: Any) -> Job:
        names = {p.name for p in Path(folder_path).iterdir()}
        uploads.append((Path(folder_path).name, more.get("path_in_repo"), more["commit_message"], names))
        return Job()

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)

    def init(self: Any, *_: Any, **__: Any) -> None:
        self.hub_model_id, self.push_in_progress = "me/model", None

    monkeypatch.setattr(Trainer, "init_hf_repo", init)
    run = tmp_path / "run"
    trainer = make(
        "sft", model, run, max_steps=2, save_steps=1, push_to_hub=True, hub_strategy="all_checkpoints"
    )
    trainer.train()
    assert [one[:3] for one in uploads] == [
        ("run", None, "Training in progress, step 1"),
        ("checkpoint-1", "checkpoint-1", "Training in progress, step 1, checkpoint"),
        ("run", None, "Training in progress, step 2"),
        ("checkpoint-2", "checkpoint-2", "Training in progress, step 2, checkpoint"),
    ]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= uploads[0][3]
    assert "manifest.json" in uploads[1][3] and not any(n.endswith(".bin") for one in uploads for n in one[3])
    assert_is_the_model(run, trainer.host)
