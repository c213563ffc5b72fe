"""What docs/troubleshooting.md quotes is what the program says: the situations are provoked."""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from horizon_lm import HostModel, errors
from horizon_lm.checkpoint.folder import locked
from horizon_lm.cli import main
from horizon_lm.config import TrainConfig
from horizon_lm.errors import HorizonError
from horizon_lm.training.memory_faults import explained
from horizon_lm.training.prepare import check_share

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TINY = """
init_model:
  {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
train_tokenizer_vocab_size: 400
datasets: [text.txt]
max_length: 64
max_steps: 6
save_steps: 2
device: cpu
output_dir: runs/tiny
"""
OTHER_TEMPLATE = (
    "{{ messages | length }}{% for m in messages | reverse %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
)


def test_each_exit_code_is_explained() -> None:
    known = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, HorizonError)
    }
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.M)}
    assert explained == known | {0, 130}


# ---- Situations -----------------------------------------------------------------------------

WIDE = [f"init_model.{key}" for key in ("hidden_size=2048", "num_hidden_layers=8", "intermediate_size=8192")]
TUNE = ["train", "model_name_or_path=runs/tiny/model", "output_dir=runs/other", "device=cpu"]
COMMANDS = {
    "host memory": (["train", "tiny.yaml", "output_dir=runs/h", *WIDE, "host_memory_gb=6"], 3),
    "unknown key": (["train", "tiny.yaml", "learnig_rate=1e-4"], 2),
    "earlier run": (["train", "tiny.yaml"], 2),
    "no GPU": (["train", "tiny.yaml", "output_dir=runs/g", "device=cuda"], 2),
    "Hub": (["train", "model_name_or_path=Qwen/Qwen3-8B", "datasets=text.txt"], 2),
    "no file": (["train", "tiny.yaml", "output_dir=runs/c", "datasets=none.jsonl"], 4),
    "bad JSON": ([*TUNE, "datasets=bad.jsonl"], 4),
    "columns": ([*TUNE, "datasets=odd.jsonl"], 4),
    "no template": ([*TUNE, "datasets=chats.jsonl"], 4),
    "no such token": ([*TUNE, "datasets=chats.jsonl", "chat_template=chatml"], 2),
    "other template": ([*TUNE, "datasets=chats.jsonl", "chat_template=other.jinja"], 4),
    "no answer": ([*TUNE, "datasets=noanswer.jsonl", "chat_template=plain"], 4),
    "too long": ([*TUNE, "datasets=chats.jsonl", "chat_template=plain", "max_length=8"], 4),
    "NaN": (["train", "tiny.yaml", "output_dir=runs/nan", "learning_rate=1e30", "max_grad_norm=0"], 6),
    "settings": (["resume", "runs/tiny", "learning_rate=1e-3"], 2),
    "no checkpoint": (["resume", "runs/none"], 5),
    "finished": (["resume", "runs/tiny"], 0),
    "damaged": (["verify", "runs/corrupt"], 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a trained run, runs/tiny."""
    place = tmp_path_factory.mktemp("troubles")
    (place / "tiny.yaml").write_text(TINY)
    (place / "text.txt").write_text("".join(f"{i} The quick brown fox jumps.\n" for i in range(400)))
    question, answer = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi, good day"},
    )
    for name, row, count in (
        ("chats", {"messages": [question, answer]}, 60),
        ("noanswer", {"messages": [question]}, 10),
        ("odd", {"question": "a", "reply": "b"}, 5),
    ):
        (place / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    (place / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]\n')
    (place / "other.jinja").write_text(OTHER_TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", "tiny.yaml"]) == 0
    shutil.copytree(place / "runs/tiny/checkpoint-6", place / "runs/corrupt/checkpoint-6")
    with (place / "runs/corrupt/checkpoint-6/buffers.safetensors").open("ab") as file:
        file.write(bytes(285))
    return place


def plain(text: str) -> str:
    """Return a message without its figures and the folder of this test."""
    return re.sub(r"[\d.,]+( [kMGT]?B)?", "N", re.sub(r"looked in \S+", "looked in PLACE", text))


def is_quoted(line: str) -> bool:
    return plain(line) in plain(PAGE).splitlines()


def last_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the error and its hint, or the two lines of a result."""
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith(("error: ", "hint: "))]
    lines = lines or output.out.splitlines()
    assert len(lines) == 2
    return lines


@pytest.mark.parametrize("name", COMMANDS)
def test_a_provoked_message_is_quoted(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(folder)
    arguments, code = COMMANDS[name]
    assert main(arguments) == code
    for line in last_lines(capsys):
        assert is_quoted(line), line


def test_a_folder_in_use_is_quoted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    Path("runs/killed").mkdir()
    with locked(Path("runs/killed")):
        assert main(["train", "tiny.yaml", "output_dir=runs/killed"]) == 2
    assert all(is_quoted(line) for line in last_lines(capsys))


def test_a_full_disk_is_quoted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=492_000))
    assert main(["train", "tiny.yaml", "output_dir=small/run"]) == 3
    assert all(is_quoted(line) for line in last_lines(capsys))


def test_too_few_micro_batches_for_the_ranks_are_quoted(folder: Path) -> None:
    config = TrainConfig.from_yaml(folder / "tiny.yaml")
    with pytest.raises(HorizonError) as raised:
        check_share(config, types.SimpleNamespace(ranks=types.SimpleNamespace(world=2)))  # type: ignore
    assert f"error: {raised.value.message}\nhint: {raised.value.hint}\n" in PAGE


def test_a_provoked_message_of_the_library_is_quoted(folder: Path) -> None:
    place = folder / "runs/tiny/model"
    with HostModel.from_pretrained(place, device="cpu") as model, pytest.raises(HorizonError) as raised:
        model.step(lr=1e-3)
    assert f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}" in PAGE


def test_a_device_without_memory_is_explained(tmp_path: Path) -> None:
    config = TrainConfig(model_name_or_path="some", datasets=["x.txt"], output_dir=str(tmp_path))
    error = explained(torch.OutOfMemoryError("CUDA out of memory. Tried ..."), config)
    assert isinstance(error, errors.DoesNotFitError) and error.hint
    assert "error: the device is out of memory: ..." in PAGE and error.message.startswith(
        "the device is out of"
    )
    assert "hint: next smaller: ..." in PAGE and error.hint.startswith("next smaller: ")


def test_what_nobody_says_is_noticed() -> None:
    """The negative control."""
    assert is_quoted("hint: did you mean 'learning_rate'?")
    assert not is_quoted("error: command line: unknown setting 'learnig_rate'")


def test_no_message_is_quoted_that_is_not_provoked() -> None:
    """Besides: torchrun's own message, and a signal's, which tests/training/test_stops.py has."""
    assert PAGE.count("```text") == len(COMMANDS) + 5 + 2
