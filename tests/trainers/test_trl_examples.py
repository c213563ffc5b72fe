"""The example scripts, and TRL's own scripts with two lines changed, train a small model offline."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sizes import SOAK
from trainer_pairs import rows, small_model
from trainer_runs import tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}
SCRIPTS = {**METHODS, "kto": "KTOTrainer"}
FLAGS = "--use_cpu True --bf16 False --max_steps 2 --per_device_train_batch_size 2 --report_to none"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(script: Path, method: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder / "data"
    data.mkdir()
    lines = [json.dumps(row) for row in rows(method, 12, 1)]
    (data / "train.jsonl").write_text("\n".join(lines))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(data), *FLAGS.split()]
    flags += ["--eval_strategy", "no"]
    monkeypatch.setattr(sys, "argv", [str(script), *flags, "--output_dir", str(folder / "run")])
    runpy.run_path(str(script), run_name="__main__")
    if "--use_peft" in FLAGS:
        weights = load_file(folder / "run" / "adapter_model.safetensors")
        assert any(value.any() for name, value in weights.items() if "lora_B" in name)
        return
    trained = AutoModelForCausalLM.from_pretrained(folder / "run", dtype=torch.float32)
    before = dict(small_model("llama").named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in trained.named_parameters())


def changed(source: str, theirs: str) -> str:
    """The two lines: the import, and the call."""
    call = f"trainer = {theirs}("
    assert source.count(call) == 1 and source.count(f"from trl import {theirs}, ") == 1
    source = source.replace(call, f"trainer = Horizon{theirs}(")
    wanted = f"from horizon_lm.trainers import Horizon{theirs}; from trl import "
    return source.replace(f"from trl import {theirs}, ", wanted)


@pytest.mark.parametrize("method", METHODS)
def test_an_example(method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ROOT / "examples" / f"{method}_trl.py", method, model, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_an_example_resumes(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps the second once more, from the command line, with the same bits."""
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", f"{FLAGS} --save_steps 1")
    script = ROOT / "examples" / f"{method}_trl.py"
    run(script, method, model, tmp_path, monkeypatch)
    weights = tmp_path / "run" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume_from_checkpoint", "True"])
    runpy.run_path(str(script), run_name="__main__")
    assert weights.read_bytes() == expected
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "manifest.json").read_text())
    assert state["parent"] == str(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_script_of_trl_itself(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = (Path(trl.__file__).parent / "scripts" / f"{method}.py").read_text()
    script = tmp_path / "script.py"
    script.write_text(changed(theirs, SCRIPTS[method]))
    run(script, method, model, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", SCRIPTS if SOAK else ["dpo"])
def test_the_script_of_trl_with_an_adapter(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", f"{FLAGS} --use_peft --lora_r 4")
    test_the_script_of_trl_itself(method, model, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_an_example_is_trls_but_for_two_lines(method: str) -> None:
    """With TRL's trainer in its place, nothing of ours is left."""
    plain = METHODS[method]
    source = (ROOT / "examples" / f"{method}_trl.py").read_text()
    code = source.split('"""', 2)[2]
    lines = [line for line in code.splitlines() if "orizon" in line]
    assert lines == [f"from horizon_lm.trainers import Horizon{plain}", f"    trainer = Horizon{plain}("]
    back = code.replace("horizon_lm.trainers", "trl").replace("Horizon", "")
    names: list[Any] = [n for n in ast.walk(ast.parse(back)) if isinstance(n, ast.ImportFrom)]
    assert all(hasattr(trl, a.name) for node in names if node.module == "trl" for a in node.names)
