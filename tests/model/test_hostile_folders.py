"""Damaged and hostile model folders are refused in words, and have no file outside read."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import horizon_lm as hz
from horizon_lm import cli
from horizon_lm.data.tokenizer import load_tokenizer
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.model.folder import check_model_folder
from horizon_lm.model.loading import load_model
from horizon_lm.training.generate import Generator
from sizes import times
from trained_run import run as run
from trained_run import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


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
