"""Export: what transformers' own `save_pretrained` writes, a unit at a time, from a store or a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from export_memory import contents, measure_export, save_on_ranks
from horizon_lm import cli
from horizon_lm.checkpoint.card import model_card
from horizon_lm.host_model import HostModel
from horizon_lm.training.train import train
from rank_saves import large_model
from small_runs import settings, write_text

# dense, tied, mixtures whose experts are fused in memory and apart on disk, parameters kept in fp32
MODELS = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_folder_is_the_one_that_transformers_writes(name: str, shard: str, tmp_path: Path) -> None:
    """Names, shapes and bits, in one file and in many."""
    config = zoo.CASES[name].config()
    source = zoo._from_config(config, torch.float32, seed=0, attn="eager")
    source.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    model = HostModel.from_pretrained(source, device="cpu", dtype="float32", skip_memory_check=True)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    theirs, ours = contents(tmp_path / "theirs"), contents(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 3) == (shard == "20KB")
    if shard == "20KB":
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        other = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
        assert index["metadata"]["total_size"] == other["metadata"]["total_size"]
        assert all(len(load_file(file)) for file in files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.architectures == [type(source).__name__]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = write_text(tmp_path_factory.mktemp("data") / "text.txt")
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(text, run, max_steps=4, save_steps=2, dtype="bfloat16", run_name="a run"))
    return run


def test_an_exported_checkpoint_is_the_model_of_the_run(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    ours, theirs = contents(tmp_path / "out"), contents(run / "model")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in (run / "model").iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the store").input_ids) == "the store"
    before = json.loads((run / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    assert cli.main(["export", str(run / "checkpoint-2"), str(tmp_path / "two")]) == 0
    earlier = contents(tmp_path / "two")
    assert any(not torch.equal(earlier[key], ours[key]) for key in ours)  # the control


def test_float32_gives_the_masters(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    wide, narrow = contents(tmp_path / "out"), contents(run / "model")
    assert all(value.dtype == torch.float32 for value in wide.values())
    assert all(torch.equal(wide[key].bfloat16(), narrow[key]) for key in wide)
    assert any(not torch.equal(wide[key], narrow[key].float()) for key in wide)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_card_says_what_was_trained_on_what(run: Path) -> None:
    card = (run / "model" / "README.md").read_text()
    for part in (
        "# a run",
        "trained for 4 steps on 128 tokens",
        "text.txt",
        "| learning_rate | 0.005 |",
        "torch",
    ):
        assert part in card
    assert str(run.parent) not in card and str(Path.home()) + os.sep not in card
    base = {"model_name_or_path": "some/model", "datasets": [{"path": "/home/me/secret/rows.jsonl"}]}
    card = model_card(base, model_type="llama", step=1, num_tokens=None, versions={})
    assert "base_model: some/model" in card and "- rows.jsonl" in card and "secret" not in card


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent", "out"], 5, "holds no checkpoint"),
        (["RUN", "RUN"], 2, "exists and is not empty"),
        (["RUN", "out", "--dtype", "int8"], 2, "--dtype is 'int8'"),
        (["RUN", "out", "--max-shard-size", "much"], 2, "--max-shard-size is 'much'"),
    ],
)
def test_wrong_exports_are_one_line(
    arguments: list[str], code: int, message: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [
        str(run) if a == "RUN" else str(tmp_path / a) if a in ("absent", "out") else a for a in arguments
    ]
    assert cli.main(["export", *given]) == code
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    """The one before it is, with a warning that names the damage."""
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "checkpoint-4" / "unit-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cli.main(["export", str(copy / "checkpoint-4"), str(tmp_path / "out")]) == 5
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(copy), str(tmp_path / "out")]) == 0
    assert "trained for 2 steps" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("world", [1, 3])
def test_an_export_takes_the_memory_of_a_unit_and_not_of_the_model(world: int, tmp_path: Path) -> None:
    """25 M parameters in fp32 from bf16: 100 MB of weights, of which no unit has more than 8 MB. world: ranks
    that wrote the checkpoint."""
    model = HostModel.from_pretrained(
        large_model(), device="cpu", moment_dtype="bfloat16", optim="sgd", skip_memory_check=True
    )
    save_on_ranks(model, tmp_path / "run", world)
    total, grown = measure_export(tmp_path / "run", tmp_path / "out", "Form('float32', '40MB')")
    assert total > 95e6
    assert grown < 0.5 * total
