"""Vision-language models as folders: loaded by their own class, saved whole, resumed; and with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import horizon_lm as hz
import small_runs
import vision_zoo as vision
from horizon_lm.checkpoint.exported import Form, export_checkpoint
from horizon_lm.config import TrainConfig
from horizon_lm.config.python import model_settings
from horizon_lm.model.pictures import vision_modules
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.plan.show import describe
from horizon_lm.report.flops import model_flops
from horizon_lm.training.train import train
from plain_gradients import stream

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [[0], [1, 2]]


def micro_batch(name: str) -> dict[str, torch.Tensor]:
    return vision.batch(name, ROWS) | vision.pixels(name, [0, 1, 2])


def logits(model: Any, name: str) -> torch.Tensor:
    given = {key: value for key, value in micro_batch(name).items() if key != "labels"}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_a_folder_is_loaded_trained_and_saved_whole(name: str, tmp_path: Path) -> None:
    source = vision.build(name)
    source.save_pretrained(tmp_path / "model")
    host = hz.HostModel.from_pretrained(
        tmp_path / "model", device="cpu", dtype="float32", skip_memory_check=True
    )
    assert type(host.skeleton.model) is type(source)
    assert host.num_parameters == sum(p.numel() for p in source.parameters())
    host.save_pretrained(tmp_path / "same")
    same = AutoModelForImageTextToText.from_pretrained(tmp_path / "same")
    assert torch.equal(logits(same, name), logits(source, name))
    host.train_step([micro_batch(name)], lr=1e-2)
    host.save_pretrained(tmp_path / "tuned")
    tuned = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    assert type(tuned) is type(source)
    found = host.evaluate([micro_batch(name)])
    with torch.no_grad():
        wanted = tuned.eval()(**micro_batch(name), use_cache=False).loss.item()
    assert found.loss == pytest.approx(wanted, rel=1e-6)
    parts, before = host.skeleton.pictures, dict(source.named_parameters())
    for key, value in tuned.named_parameters():
        assert torch.equal(value, before[key]) == parts.is_vision(key), key


def test_a_trained_projector_is_saved(tmp_path: Path) -> None:
    source = vision.build("internvl")
    host = stream(source, train_projector=True)
    host.train_step([micro_batch("internvl")], lr=1e-2)
    host.save_pretrained(tmp_path / "tuned")
    tuned = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned").named_parameters())
    for key, value in source.named_parameters():
        assert torch.equal(tuned[key], value) == key.startswith("model.vision_tower."), key


def settings(folder: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    values = small_runs.values(folder / "text.txt", output_dir, model_name_or_path=str(folder), **changes)
    del values["init_model"], values["train_tokenizer_vocab_size"]
    return TrainConfig.from_dict(values | {"max_steps": 3})


def test_a_run_on_text_is_resumed_and_exported(tmp_path: Path) -> None:
    """A run that was cut short and resumed ends with the bits of one that was not, the tower included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    vision.build("qwen3_vl").save_pretrained(tmp_path / "model")
    text = small_runs.write_text(tmp_path / "model" / "text.txt")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path / "model")
    text_of_plan = describe(plan_run(settings(tmp_path / "model", tmp_path / "run")))
    assert "3 layers\nvision     52,656 parameters of these, frozen; not part of a step" in text_of_plan
    train(settings(tmp_path / "model", tmp_path / "run"))
    whole = small_runs.tensors_of(tmp_path / "run" / "checkpoint-3")
    for rest in ("checkpoint-3", "model"):
        (tmp_path / "run" / rest).rename(tmp_path / f"straight-{rest}")
    train(settings(tmp_path / "model", tmp_path / "run", resume_from_checkpoint="latest"))
    assert small_runs.tensors_of(tmp_path / "run" / "checkpoint-3") == whole
    export_checkpoint(tmp_path / "run", tmp_path / "exported", Form())
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "exported" / "README.md").read_text()
    folders = (tmp_path / "exported", tmp_path / "straight-model")
    exported, saved = map(AutoModelForImageTextToText.from_pretrained, folders)
    assert torch.equal(logits(exported, "qwen3_vl"), logits(saved, "qwen3_vl"))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_adapters_are_in_the_language_model_alone(name: str, tmp_path: Path) -> None:
    """all-linear as PEFT means it, without the vision part; gradients are those of PEFT's own model."""
    import peft

    host = stream(vision.build(name), adapter="lora", lora_r=4)
    trained = {p.name for unit in host.skeleton.units for p in unit.trainable}
    linears = {
        path
        for path, module in vision.build(name).model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {key.split("language_model.")[1].split(".lora_")[0] for key in trained} == linears
    host.train_step([micro_batch(name)], lr=1e-2)
    host.save_pretrained(tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(vision.build(name), tmp_path / "adapter", is_trainable=True)
    given = stream_peft(reference)
    loss = reference(**micro_batch(name), use_cache=False).loss
    loss.backward()
    assert given.forward_backward([micro_batch(name)]).loss == loss.item()
    assert host.evaluate([micro_batch(name)]).loss == pytest.approx(loss.item(), rel=1e-6)
    wanted = dict(reference.get_base_model().named_parameters())
    found = dict(given.named_gradients())
    assert found.keys() == trained
    assert all(torch.equal(gradient, wanted[key].grad) for key, gradient in found.items())


def stream_peft(model: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(
        copy.deepcopy(model), device="cpu", dtype="float32", skip_memory_check=True
    )


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_a_projector_is_trained_with_an_adapter_as_a_module_to_save(name: str) -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q|v)_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    reference = peft.get_peft_model(vision.build(name), config)
    host = stream_peft(reference)
    loss = reference(**micro_batch(name), use_cache=False).loss
    loss.backward()
    assert host.forward_backward([micro_batch(name)]).loss == loss.item()
    wanted = dict(reference.get_base_model().named_parameters())
    found = dict(host.named_gradients())
    assert any("multi_modal_projector.modules_to_save" in key for key in found)
    assert all(torch.equal(gradient, wanted[key].grad) for key, gradient in found.items())
    base = vision.build(name)
    with torch.no_grad():
        plain = base.eval()(**micro_batch(name), use_cache=False).loss.item()
    assert host.evaluate([micro_batch(name)], adapter=False).loss == pytest.approx(plain, rel=1e-6)
    assert host.evaluate([micro_batch(name)]).loss != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_the_planner_knows_the_vision_part(name: str) -> None:
    """Its units are the model's; the frozen tower costs 2 bytes a parameter and no FLOPs of a step."""
    config = vision.FAMILIES[name].config()
    values = {"skip_memory_check": True}
    for more in ({}, {"train_projector": True}) if name != "qwen3_vl" else ({},):
        outline = Outline(config, model_settings("a test", "cpu", "bfloat16", values | more))
        host = hz.HostModel.from_config(config, device="cpu", dtype="bfloat16", **values, **more)
        assert outline.units == host.skeleton.units
        unit = outline.units[-1]
        assert unit.name == "vision" and unit.trainable_numel == 0
        paths = vision_modules(host.skeleton.model)
        assert all(p.name.startswith(paths) for p in unit.parameters)
        assert host.memory_bytes()["weights"] == 2 * sum(u.numel for u in outline.units)
        assert host.store.run("exp_avg", len(outline.units) - 1).numel() == 0
        found = outline.measures(2, 64, 64)
        assert found.ends.forward.bytes > 0
        counted = outline.count()
        assert counted is not None
        flops = model_flops(outline.units, counted, embedding_trainable=True)
        language = [p for u in outline.units[1 : outline.head + 1] for p in u.parameters]
        assert flops.per_token == pytest.approx(6 * sum(p.numel for p in language))
