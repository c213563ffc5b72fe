"""What comes from elsewhere cannot run code, leave its folder, or learn a secret."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import horizon_lm
import horizon_lm as hz
from horizon_lm import cli
from horizon_lm.checkpoint.disk import checksum
from horizon_lm.config import TrainConfig
from horizon_lm.data.tokenizer import load_tokenizer
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.model.loading import load_model
from horizon_lm.model_folder import check_model_folder
from horizon_lm.run.generate import Generator
from horizon_lm.run.train import train
from sizes import times
from small_runs import settings, values, write_text
from test_checkpoint import resealed

SOURCE = Path(horizon_lm.__file__).parent
FUZZED = times(360, 1050)


pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(text, run, max_steps=2))
    return run


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


# Damaged and hostile model folders.


def test_damaged_model_folders_are_refused_in_words(tmp_path: Path, record_property: Any) -> None:
    """Truncated, noise, other headers, missing shards, an index that leaves the folder: never a crash."""
    rng, cases = random.Random(7), 0
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    source = tmp_path / "source"
    LlamaForCausalLM(config).save_pretrained(source, max_shard_size="4KB")
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(shards) > 2

    def refused(change: Callable[[Path], None]) -> None:
        nonlocal cases
        folder = shutil.copytree(source, tmp_path / "model")
        change(folder)
        with pytest.raises((DataError, ConfigError)) as caught:
            load_model(folder, trust_remote_code=False, revision=None, attn_implementation="sdpa")
        assert str(folder) in caught.value.message
        shutil.rmtree(folder)
        cases += 1

    def truncated(folder: Path) -> None:
        file = folder / rng.choice(shards)
        os.truncate(file, rng.randrange(file.stat().st_size))

    def noise(folder: Path) -> None:
        (folder / rng.choice(shards)).write_bytes(rng.randbytes(rng.randrange(1, 4000)))

    def header(folder: Path) -> None:
        file = folder / rng.choice(shards)
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = rng.choice([b"{" * size, b"[]", b'{"a":' * (size // 5), data[8 : 8 + size - 9]])
        length = rng.choice([len(text), len(text), 1 << 40, size + 5])
        file.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])

    def fuzzed(folder: Path) -> None:
        """Some bytes of the header are others, one of them in a key that is needed."""
        file = folder / rng.choice(shards)
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        keys = re.search(rb'"data_offsets":\[', data)
        assert keys is not None
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(8, 8 + size)] = rng.choice(b'{}[]",:x0\x00\xff')
        data[keys.start() + 1] = 0  # this one never does
        file.write_bytes(data)

    def shape(folder: Path) -> None:
        file = folder / rng.choice(shards)
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        entry = table[rng.choice(sorted(table.keys() - {"__metadata__"}))]
        entry["shape"] = rng.choice(
            [[1, *entry["shape"]], [n + 1 for n in entry["shape"]], [-1], "x", [1 << 62]]
        )
        text = json.dumps(table).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def missing(folder: Path) -> None:
        (folder / rng.choice(shards)).unlink()

    def index(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        key = rng.choice(sorted(values["weight_map"]))
        values["weight_map"][key] = rng.choice(
            ["../x", "/etc/passwd", "..", "a/b", "", 5, "gone.safetensors"]
        )
        path.write_text(json.dumps(values))

    def no_index(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(rng.choice(["", "[]", "{", '{"weight_map": 5}', "{}"]))

    for change, count in (
        (truncated, 200),
        (noise, 200),
        (header, 200),
        (fuzzed, 300),
        (shape, 50),
        (missing, 10),
        (index, 20),
        (no_index, 10),
    ):
        for _ in range(times(count // 5, count)):
            refused(change)
    load_model(source, trust_remote_code=False, revision=None, attn_implementation="sdpa")  # the control
    record_property("cases", cases)
    print(f"{cases} damaged model folders: all refused in words")


# What a model's folder has read.


def _outside(run: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A model's folder whose weights lie outside of it, and an index that names them."""
    folder = shutil.copytree(run / "model", tmp_path / "model")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    with safe_open(tmp_path / "outside.safetensors", framework="pt") as file:
        return folder, dict.fromkeys(file.keys(), "../outside.safetensors")


def _load(folder: Path) -> None:
    Generator.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["../outside.safetensors", "absolute", "a/../../outside.safetensors"])
def test_an_index_cannot_have_files_outside_read(
    name: str, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By any command; also the index that config.json names. The control: transformers follows it."""
    folder, names = _outside(run, tmp_path)
    names = dict.fromkeys(names, str(tmp_path / "outside.safetensors") if name == "absolute" else name)
    (folder / "a").mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / "other.safetensors").touch()  # or it is no model for some commands
    given = [f"model_name_or_path={folder}", f"datasets={text}", "max_length=16", "device=cpu"]
    verbs = [
        ["generate", str(folder), "--prompt", "a"],
        ["eval", str(folder), f"eval_datasets={text}", "device=cpu"],
        ["train", *given, f"output_dir={tmp_path / 'new'}"],
        ["plan", *given],
    ]
    for verb in verbs if name == "absolute" else verbs[:1]:
        assert cli.main(verb) == 4, verb
        assert f"error: {index} names " in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "b.safetensors.index.json"})
    )
    index.rename(folder / "b.safetensors.index.json")
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(DataError, match="which is not in its folder"):
        _load(folder)
    assert not (tmp_path / "new").exists()


def test_links_of_a_model_folder_are_followed(run: Path, tmp_path: Path) -> None:
    """As they are in the Hub's cache, and where weights lie on another disk."""
    folder, _ = _outside(run, tmp_path)
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    (tmp_path / "folder").symlink_to(folder)
    found = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    model = hz.HostModel.from_pretrained(tmp_path / "folder", device="cpu", dtype="float32")
    masters = dict(model.named_parameters())
    assert masters and all(torch.equal(value, found[name].float()) for name, value in masters.items())


def test_a_pipe_in_a_model_folder_is_refused_at_once(run: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "model", tmp_path / "model")
    names = sorted(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in [*names, "model.safetensors.index.json"]:
        aside = shutil.move(folder / name, tmp_path / "aside") if name in names else None
        os.mkfifo(folder / name)
        for look in (check_model_folder, load_tokenizer):
            with pytest.raises(DataError, match="a named pipe, not a file"):
                look(str(folder))
        (folder / name).unlink()
        if aside is not None:
            shutil.move(aside, folder / name)
    check_model_folder(folder)  # the control


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


# Configuration files and command lines that are wrong.

_BITS = (
    "",
    "null",
    "true",
    "-1",
    "1e400",
    ".nan",
    ".inf",
    "[]",
    "{}",
    "[1, 2",
    "{a: b",
    "'x",
    '"\\ud800"',
    "!!python/object:os.system x",
)
_BITS += (
    "&a [*a]",
    "<<: *x",
    "0x",
    "1_000",
    "01",
    "yes",
    "~",
    "a: b: c",
    "\t",
    "x" * 5000,
    "- " * 200,
    "é\u202e",
    "%",
    "@",
    "`",
)


def fuzzed(rng: random.Random, base: str) -> str:
    """A configuration file with something wrong in it."""
    lines = base.splitlines()
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(len(lines))
        kind = rng.randrange(9)
        key, _, value = lines[i].partition(":")
        if kind == 0:
            lines[i] = f"{key}: {rng.choice(_BITS)}"
        elif kind == 1 and len(key) > 2:
            j = rng.randrange(len(key) - 1)
            lines[i] = key[:j] + key[j + 1] + key[j] + key[j + 2 :] + ":" + value
        elif kind == 2:
            lines.insert(i, lines[i])
        elif kind == 3:
            lines[i] = " " * rng.randrange(1, 4) + lines[i]
        elif kind == 4:
            lines[i] = lines[i].replace(":", rng.choice(["", "=", "::", ": -", ": *"]), 1)
        elif kind == 5:
            lines[i] = f"{key}: {rng.uniform(-1e9, 1e9)}"
        elif kind == 6:
            lines[i] = "".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randrange(1, 30)))
        elif kind == 7:
            lines[i] = f"{key}: [{', '.join(rng.choice(_BITS) for _ in range(3))}]"
        else:
            lines[i] = f"{key}: {{{rng.choice(_BITS)}: {rng.choice(_BITS)}}}"
    return "\n".join(lines)


def test_fuzzed_configurations_end_with_2_and_a_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """Valid files and command lines pass, all others are refused in words, never with a traceback."""
    rng = random.Random(23)
    base = TrainConfig.from_dict(values(Path("t.txt"), Path("r"))).to_yaml()
    path = tmp_path / "run.yaml"
    refused = accepted = 0
    verbs = ["train", "resume", "verify", "export", "config", "data", "eval", "init", "generate", ""]
    for number in range(FUZZED):
        if number % 3:
            path.write_text(fuzzed(rng, base), encoding="utf-8", errors="surrogatepass")
            arguments = ["config", "validate", str(path)]
        elif number % 2:
            path.write_text(base)
            keys = list(TrainConfig.model_fields)
            words = [f"{rng.choice(keys)}={rng.choice(_BITS)}" for _ in range(rng.randrange(1, 3))]
            words += rng.sample(
                ["--", "-x", "=", "a.b=1", "--lr", "lr=1", "x.yaml", "--learning-rate=fast"], 2
            )
            arguments = ["config", "validate", str(path), *words]
        else:
            verb = rng.choice(verbs)
            words = [
                rng.choice([*_BITS, "--help-me", "-", "--dtype", str(tmp_path / "no"), "a=b"])
                for _ in range(2)
            ]
            arguments = [verb, *words] if verb not in ("train", "eval", "data") else [verb, "--x", *words]
        code = cli.main(arguments)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, (arguments, shown.err)
        assert code in (0, 2, 4, 5), (arguments, code, shown.err)
        if code == 0:
            accepted += 1
            continue
        refused += 1
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        usage = shown.err.startswith("Usage: ")  # no verb at all: the help
        assert len(errors) == 1 and len(errors[0]) > 15 or usage, (arguments, shown.err)
        if arguments[:2] == ["config", "validate"]:
            assert code == 2
    assert refused > 0.6 * FUZZED and accepted > FUZZED / 100
    record_property("refused", refused)
    print(f"{FUZZED} configurations and command lines: {refused} refused in words, {accepted} valid")


def test_the_valid_configuration_is_accepted(tmp_path: Path) -> None:
    """The control."""
    path = tmp_path / "run.yaml"
    path.write_text(TrainConfig.from_dict(values(Path("t.txt"), Path("r"))).to_yaml())
    assert cli.main(["config", "validate", str(path)]) == 0
