"""What comes from elsewhere cannot run code, leave its folder, or learn a secret."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

import horizon_lm
from horizon_lm import cli
from horizon_lm.checkpoint.disk import checksum
from horizon_lm.errors import ConfigError
from horizon_lm.training.train import train
from saved_models import resealed
from small_runs import settings
from trained_run import run as run
from trained_run import text as text

SOURCE = Path(horizon_lm.__file__).parent

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

# No pickle, no code.

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load")}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def faults_of(path: Path, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} if not node.level else set()
        else:
            names = set()
        found += [f"{path}: imports {name}" for name in names & FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            call = node.func
            if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                if (call.value.id, call.attr) in FORBIDDEN_CALLS:
                    found.append(f"{path}: calls {call.value.id}.{call.attr}")
            elif isinstance(call, ast.Name) and call.id in FORBIDDEN_NAMES:
                found.append(f"{path}: calls {call.id}")
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True:
                    found.append(f"{path}: trusts remote code")
                if keyword.arg == "shell" and getattr(keyword.value, "value", None) is True:
                    found.append(f"{path}: runs a shell")
    return found


def test_the_source_has_no_pickle_and_runs_no_text_as_code() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 60
    assert [fault for path in files for fault in faults_of(path, path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load('x')",
        "yaml.load(f)",
        "eval('1')",
        "f(trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_look_at_the_source_sees_what_it_looks_for(line: str) -> None:
    assert len(faults_of(Path("x"), line)) == 1


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.canary,))


def test_pickles_in_a_checkpoint_or_a_model_folder_are_never_opened(
    run: Path, text: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("unit-00001.safetensors", "buffers.safetensors", "manifest.json", "config.json"):
        shutil.rmtree(copy / "checkpoint-2")
        shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2")
        (copy / "checkpoint-2" / name).write_bytes(bomb)
        for verb in (["verify", str(copy / "checkpoint-2")], ["resume", str(copy / "checkpoint-2")]):
            assert cli.main(verb) == 5
        assert cli.main(["export", str(copy / "checkpoint-2"), str(tmp_path / "out")]) == 5
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    config = settings(
        text,
        tmp_path / "new",
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(folder),
    )
    with pytest.raises(ConfigError, match="holds no"):
        train(config)
    assert not canary.exists()
    pickle.loads(bomb)  # the control
    assert canary.exists()


def test_code_of_a_model_folder_is_not_run(run: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "model", tmp_path / "model")
    canary = tmp_path / "canary"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", None],
    }
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    given = settings(
        text,
        tmp_path / "new",
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(folder),
    )
    with pytest.raises(ConfigError):
        train(given)
    copy = shutil.copytree(run, tmp_path / "run")
    data = json.dumps(config).encode()
    (copy / "checkpoint-2" / "config.json").write_bytes(data)
    (copy / "checkpoint-2" / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    resealed(copy / "checkpoint-2", lambda v: v["files"].update({"config.json": [len(data), checksum(data)]}))
    assert cli.main(["export", str(copy / "checkpoint-2"), str(tmp_path / "out")]) == 2
    assert not canary.exists() and not (tmp_path / "new").exists() and not (tmp_path / "out").exists()


def test_a_checkpoint_cannot_make_an_export_write_elsewhere(run: Path, tmp_path: Path) -> None:
    """Names with folders that leave, absolute names, links: refused before anything is written."""
    outside = tmp_path / "outside.txt"
    for name in ("../outside.txt", str(outside), "a/../../outside.txt", "..", "a\\..\\b"):
        copy = tmp_path / "checkpoint-2"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run / "checkpoint-2", copy)

        def change(v: dict[str, Any], name: str = name) -> None:
            v["files"][name] = v["files"].pop("tokenizer.json")

        resealed(copy, change)
        assert cli.main(["export", str(copy), str(tmp_path / "out")]) == 5
    assert not outside.exists() and not (tmp_path / "out").exists()


# Secrets.


def test_secrets_are_in_no_file_and_in_no_output(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {}
    for number, key in enumerate(
        ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
    ):
        secrets[key] = f"canary{number}{random.Random(number).getrandbits(64):x}"
        monkeypatch.setenv(key, secrets[key])
    config = settings(text, tmp_path / "run", max_steps=2, plot_loss=True)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "run" / "out")]) == 0
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 20
    for secret in secrets.values():
        assert secret not in shown.out + shown.err
        assert not [p for p in files if secret.encode() in p.read_bytes()]
    # the control: a secret in a file would be found
    (tmp_path / "run" / "x").write_text(secrets["HF_TOKEN"])
    assert secrets["HF_TOKEN"].encode() in (tmp_path / "run" / "x").read_bytes()


def test_no_socket_is_opened(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a run opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    train(settings(text, tmp_path / "run", max_steps=2))
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
