"""Bad input ends with its exit code and one clear line with a hint; nothing is written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from horizon_lm import cli, host_model
from horizon_lm.checkpoint import folder as run_folder
from horizon_lm.errors import DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.memory import preflight
from horizon_lm.training import finish
from horizon_lm.training import train as run_train
from tiny_runs import RUN_FILES, Run, entries, settings
from tiny_runs import run as run
from tiny_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread")


def break_nothing(run: Run, tmp_path: Path) -> list[str]:
    return []


def no_tokenizer(run: Run, tmp_path: Path) -> list[str]:
    folder = copy_model(run, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return [f"model_name_or_path={folder}"]


def nan_weight(run: Run, tmp_path: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    folder = copy_model(run, tmp_path)
    model.save_pretrained(folder)
    return [f"model_name_or_path={folder}"]


def empty_data(run: Run, tmp_path: Path) -> list[str]:
    (tmp_path / "empty.txt").write_text("")
    return [f"datasets={tmp_path / 'empty.txt'}"]


def short_data(run: Run, tmp_path: Path) -> list[str]:
    (tmp_path / "short.txt").write_text("the store.")
    return [f"datasets={tmp_path / 'short.txt'}"]


def small_vocabulary(run: Run, tmp_path: Path) -> list[str]:
    """A tokenizer with tokens that the model does not know."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "small")
    return [f"model_name_or_path={tmp_path / 'small'}", f"tokenizer_name_or_path={run.folder / 'model'}"]


def copy_model(run: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (run.folder / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


BAD_INPUT: dict[str, tuple[Callable[[Run, Path], list[str]], int, str]] = {
    "missing model": (lambda run, tmp: [f"model_name_or_path={tmp / 'absent'}"], 2, "is not a folder"),
    "missing data": (lambda run, tmp: [f"datasets={tmp / 'absent.txt'}"], 4, "does not exist"),
    "no tokenizer": (no_tokenizer, 2, "has no tokenizer"),
    "empty data": (empty_data, 4, "holds no text"),
    "text shorter than a sequence": (short_data, 4, "less than one sequence of 32"),
    "token outside the vocabulary": (small_vocabulary, 4, "outside the model's vocabulary of 200"),
    "sequences too long": (lambda run, tmp: ["max_length=65"], 2, "max_position_embeddings=64"),
    "NaN loss": (nan_weight, 6, "the loss of step 1 is nan"),
    "no such device": (lambda run, tmp: ["device=cuda:99"], 2, "device="),
    "curve refuses": (
        lambda run, tmp: ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs.min_lr=many"],
        2,
        "is refused",
    ),
    "nothing wrong": (break_nothing, 0, ""),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_its_code_and_writes_nothing(
    case: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code, message = BAD_INPUT[case]
    folder = tmp_path / "runs" / "bad"
    config = settings(
        Path(run.config.datasets[0].path),
        folder,
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        max_steps=2,
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    overrides = spoil(run, tmp_path)
    assert cli.main(["train", str(tmp_path / "run.yaml"), *overrides]) == code
    shown = capsys.readouterr().err
    if code == 0:  # the control: it is not the settings around the fault
        assert entries(folder) == RUN_FILES | {"checkpoint-2"}
        return
    assert message in shown and "hint: " in shown and "Traceback" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("error: ")]) == 1
    assert not folder.parent.exists()


def test_not_enough_memory_ends_with_3_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (host_model, preflight):
        monkeypatch.setattr(module, "available_host_bytes", lambda stated, **_: 100_000)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 3
    assert "short by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_not_enough_disk_ends_with_3(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match="disk space"):
        run_train.train(settings(text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_export_leaves_metrics_and_no_half_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finish, "_save_beside", full)
    with pytest.raises(DoesNotFitError, match="No space left"):
        run_train.train(settings(text, tmp_path / "run", max_steps=2))
    assert entries(tmp_path / "run") == {"config.resolved.yaml", "metrics.jsonl", "checkpoint-2"}


def test_a_device_that_runs_out_of_memory_ends_with_3(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(HostModel, "train_step", out)
    with pytest.raises(DoesNotFitError, match="Tried to allocate") as caught:
        run_train.train(settings(text, tmp_path / "run"))
    assert caught.value.hint == "next smaller: boundaries=host"
    assert not (tmp_path / "run").exists()
