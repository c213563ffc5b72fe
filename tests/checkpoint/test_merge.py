"""Exports of runs with an adapter: PEFT's folder, and the model that PEFT's own merge gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from adapter_runs import adapter_settings, by_peft, changed_copy, logits, make_base
from adapter_runs import base as base
from adapter_runs import run as run
from adapter_runs import text as text
from export_memory import contents, measure_export, save_on_ranks
from horizon_lm import cli
from horizon_lm.checkpoint.exported import Form, Merge, merge_folder
from horizon_lm.host_model import HostModel
from horizon_lm.trainers.generation import named_weights
from horizon_lm.training.train import train
from peft_models import adapted, host
from rank_saves import large_model
from sizes import SOAK

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# PEFT's folder.


def test_an_exported_checkpoint_is_the_adapter_of_the_run(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run), str(out)]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"):
        assert (out / name).read_bytes() == (run / "model" / name).read_bytes(), name
    assert {p.name for p in out.iterdir()} == {p.name for p in (run / "model").iterdir()}
    values = json.loads((out / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(base) and values["target_modules"] == sorted(
        values["target_modules"]
    )
    card = (out / "README.md").read_text()
    assert "An adapter (lora r=4) of `base`, trained for 6 steps" in card and "library_name: peft" in card
    assert str(base) not in card
    assert AutoTokenizer.from_pretrained(out)("the store").input_ids
    # What PEFT makes of it, and the control: an earlier checkpoint is another adapter.
    assert torch.equal(logits(by_peft(out, base)), logits(by_peft(run / "model", base)))
    assert cli.main(["export", str(run / "checkpoint-2"), str(tmp_path / "two")]) == 0
    assert not same(contents(tmp_path / "two"), contents(out))
    assert not torch.equal(logits(by_peft(tmp_path / "two", base)), logits(by_peft(out, base)))


def test_a_relative_base_is_named_absolutely(
    run: Path, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    train(adapter_settings(text, tmp_path / "run", Path(base.name), max_steps=1))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-1"):
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(base)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge"]) == 0


# Merged.

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora and a module": {
        "adapter": "dora",
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "down_proj"],
    },
    "bf16 run": {"dtype": "bfloat16", "lora_r": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_that_of_peft(case: str, base: Path, text: Path, tmp_path: Path) -> None:
    """Bitwise in fp32, from the masters of the adapter; from a checkpoint and from PEFT's folder."""
    place, wide = tmp_path / "run", ("--dtype", "float32")
    train(adapter_settings(text, place, base, max_steps=3, save_dtype="float32", **CASES[case]))
    expected = by_peft(place / "model", base).merge_and_unload()
    weights = {name: p.detach() for name, p in expected.named_parameters()}
    for source, out in ((place, tmp_path / "one"), (place / "model", tmp_path / "two")):
        assert cli.main(["export", str(source), str(out), "--merge", *wide]) == 0
        assert same(contents(out), weights)
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(merged), logits(expected))
        assert not (out / "adapter_config.json").exists() and (out / "tokenizer.json").exists()
    card = (tmp_path / "one" / "README.md").read_text()
    assert "added to the weights of `base`" in card and "library_name: transformers" in card
    # The control: the base alone, and an earlier step.
    own = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(logits(merged), logits(own))
    assert cli.main(["export", str(place / "checkpoint-1"), str(tmp_path / "first"), "--merge", *wide]) == 0
    assert not same(contents(tmp_path / "first"), weights)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(text: Path, tmp_path: Path) -> None:
    base, place = make_base(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "run"
    train(adapter_settings(text, place, base, max_steps=3, dtype="bfloat16", save_dtype="float32"))
    assert cli.main(["export", str(place), str(tmp_path / "out"), "--merge"]) == 0
    found = contents(tmp_path / "out")
    exact = by_peft(place / "model", base, torch.float32).merge_and_unload()
    weights = {name: p.detach().bfloat16() for name, p in exact.named_parameters()}
    assert same(found, weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not same(found, contents(base))  # the control


FAMILIES = ["qwen3_moe", "gpt2", "gemma3_text", "mixtral"] if SOAK else ["qwen3_moe", "gpt2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_merged(name: str, tmp_path: Path) -> None:
    """Experts that are fused in memory and apart on disk; Conv1D layers; a tied head."""
    config = zoo.CASES[name].config()
    source = zoo._from_config(config, torch.float32, seed=0, attn="eager")
    source.save_pretrained(tmp_path / "base")
    asked: dict[str, Any] = {"adapter": "lora", "lora_r": 2, "skip_memory_check": True}
    asked |= {"attn_implementation": "eager"}
    model = HostModel.from_pretrained(tmp_path / "base", device="cpu", dtype="float32", **asked)
    model.train_step([zoo.batch(name, batch_size=1, length=8, seed=1)], lr=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    assert cli.main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--merge"]) == 0
    expected = by_peft(tmp_path / "adapter", tmp_path / "base").merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = dict(expected.named_parameters())
    assert all(torch.equal(p, theirs[key]) for key, p in found.named_parameters())
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "base").keys()
    own = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters())
    assert any(not torch.equal(p, own[key]) for key, p in found.named_parameters())  # the control


def test_layers_that_are_exchanged_are_merged(tmp_path: Path) -> None:
    """LN_TUNING puts a module in the place of another; and weights for another engine are the same, twice."""
    zoo.build("llama").save_pretrained(tmp_path / "base")
    model = adapted("llama", type="LNTuningConfig", target_modules=["input_layernorm", "norm"])
    model.save_pretrained(tmp_path / "adapter")
    expected = by_peft(tmp_path / "adapter", tmp_path / "base").merge_and_unload()
    weights = {name: p.detach() for name, p in expected.named_parameters()}
    merge_folder(tmp_path / "adapter", tmp_path / "out", Form(merge=Merge(str(tmp_path / "base"))))
    assert same(contents(tmp_path / "out"), weights)
    assert not same(contents(tmp_path / "base"), weights)  # the control
    streamed = host(model)
    for _ in range(2):
        assert same({name: value.clone() for name, value in named_weights(streamed)}, weights)


def test_a_merged_folder_has_a_tokenizer_and_no_pickles(run: Path, base: Path, tmp_path: Path) -> None:
    """PEFT and other trainers save pickles and no tokenizer beside an adapter."""
    folder = shutil.copytree(run / "model", tmp_path / "adapter")
    for path in folder.glob("*token*"):
        path.unlink()
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(b"0")
    (folder / "generation_config.json").write_bytes(b"0")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--merge"]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    assert found - wanted == {"tokenizer.json", "tokenizer_config.json"}
    own, theirs = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", base))
    assert own("the store").input_ids == theirs("the store").input_ids
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_wrong_merges_are_one_line(run: Path, base: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    train(adapter_settings(text, whole, base, adapter=None, max_steps=1))
    other = changed_copy(base, tmp_path / "other")
    moved = shutil.copytree(run, tmp_path / "moved")
    torn = shutil.copytree(run / "model", tmp_path / "torn")
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    capsys.readouterr()
    for arguments, code, said in (
        ([whole, out, "--merge"], 2, "holds a whole model: there is no adapter to merge"),
        ([whole / "model", out, "--merge"], 2, "is a whole model: there is no adapter to merge"),
        ([run, out, "--base", base], 2, "--base is given without --merge"),
        ([run, base, "--merge"], 2, "exists and is not empty"),
        ([run, out, "--merge", "--base", tmp_path / "gone"], 2, "is not a folder"),
        ([moved, out, "--merge", "--base", other], 5, "holds an adapter of another base than"),
        ([torn, out, "--merge"], 4, "the weights of the adapter"),
        ([run / "model", out], 5, "holds no checkpoint: it is an adapter in Hugging Face format"),
    ):
        assert cli.main(["export", *map(str, arguments)]) == code, arguments
        shown = capsys.readouterr().err
        assert said in shown and "hint: " in shown and "Traceback" not in shown, shown
        assert not out.exists()
    moved_base = shutil.copytree(base, tmp_path / "base")
    assert (
        cli.main(["export", str(moved), str(out), "--merge", "--base", str(moved_base)]) == 0
    )  # the control


# Memory.


@pytest.mark.parametrize("world", [1, 2] if SOAK else [1])
def test_a_merge_takes_the_memory_of_a_unit_and_not_of_the_model(world: int, tmp_path: Path) -> None:
    """25 M parameters in fp32: 100 MB of weights, of which no unit has more than 8 MB. world: ranks that
    wrote the checkpoint."""
    base = tmp_path / "base"
    large_model().save_pretrained(base)
    asked = {"adapter": "lora", "lora_r": 4, "dtype": "float32", "skip_memory_check": True}
    model = HostModel.from_pretrained(base, device="cpu", **asked)
    save_on_ranks(model, tmp_path / "run", world)
    form = f"Form('float32', '40MB', merge=Merge({str(base)!r}))"
    total, grown = measure_export(tmp_path / "run", tmp_path / "out", form)
    assert total > 95e6
    assert grown < 0.5 * total
