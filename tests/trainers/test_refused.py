"""Arguments that streamed training has no equivalent of are refused by name, before anything is loaded."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig
from transformers import ProcessorMixin, TrainingArguments

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.trainers import refused as refused_names
from horizon_lm.trainers import settings
from trainer_pairs import TRAINERS, arguments, rows, small_model
from trainer_runs import tokenizer


class Pictures(ProcessorMixin):
    def __init__(self) -> None:
        pass


class WithAdapter:
    config = SimpleNamespace(_name_or_path="")
    _hf_peft_config_loaded = True


# (trainer, changed fields of the configuration, changed arguments of the constructor, what is named)
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"fp16": True}, "fp16=True"),
    ("sft", {"bf16_full_eval": True}, "bf16_full_eval=True"),
    ("sft", {"fp16_full_eval": True}, "fp16_full_eval=True"),
    ("sft", {"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    ("sft", {"deepspeed": "ds.json"}, "deepspeed=ds.json"),
    ("dpo", {"fsdp": "full_shard"}, "fsdp=full_shard"),
    ("kto", {"parallelism_config": "tp"}, "parallelism_config=tp"),
    ("sft", {"torch_compile": True}, "torch_compile=True"),
    ("sft", {"use_liger_kernel": True}, "use_liger_kernel=True"),
    ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ("plain", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ("dpo", {"activation_offloading": True}, "activation_offloading=True"),
    ("dpo", {"sync_ref_model": True}, "sync_ref_model=True"),
    ("sft", {"optim": "adafactor"}, "optim=adafactor"),
    ("sft", {"optim": "paged_adamw_8bit"}, "optim=paged_adamw_8bit"),
    ("sft", {"optim_args": "a=1"}, "optim_args=a=1"),
    ("sft", {"optim_target_modules": "all-linear"}, "optim_target_modules=all-linear"),
    ("sft", {"debug": ["underflow_overflow"]}, "debug="),
    ("sft", {"chat_template_path": "someone/model"}, "chat_template_path='someone/model'"),
    ("sft", {"model_init_kwargs": {"load_in_8bit": True}}, r"model_init_kwargs\['load_in_8bit'\]"),
    ("sft", {"model_init_kwargs": {"dtype": "float16"}}, "float16"),
    ("sft", {"gradient_checkpointing_kwargs": {"selective": True}}, "selective"),
]
ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"compute_metrics": len}, "compute_metrics"),
    ("sft", {"preprocess_logits_for_metrics": len}, "preprocess_logits_for_metrics"),
    ("sft", {"compute_loss_func": len}, "compute_loss_func"),
    ("plain", {"model_init": len}, "model_init"),
    ("dpo", {"optimizers": (object(), None)}, "optimizers"),
    ("plain", {"optimizer_cls_and_kwargs": (object, {})}, "optimizer_cls_and_kwargs"),
    ("dpo", {"peft_config": object()}, "object as peft_config"),
    ("sft", {"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "peft_config of kind PROMPT_TUNING"),
    ("kto", {"quantization_config": object()}, "quantization_config"),
    ("sft", {"model": WithAdapter()}, "model with adapters"),
    ("sft", {"model": None}, "without a model"),
    ("dpo", {"ref_model": small_model("llama")}, "ref_model as a model object"),
    ("dpo", {"train_dataset": IterableDataset.from_generator(dict)}, "IterableDataset"),
    ("sft", {"eval_dataset": {"a": Dataset.from_dict({"image": [0]})}}, "eval_dataset with pictures"),
    ("sft", {"processing_class": Pictures()}, "processing_class with pictures"),
]


def refused(method: str, folder: Path, fields: dict[str, Any], more: dict[str, Any]) -> ConfigError:
    args = arguments(method, folder)
    for name, value in fields.items():  # some could not be built where their libraries are missing
        setattr(args, name, value)
    given = {"model": "no/such/model", "args": args, "train_dataset": rows(method, 4, 1), **more}
    with pytest.raises(ConfigError) as caught:
        TRAINERS[method][0](**given)
    return caught.value


@pytest.mark.parametrize(("method", "fields", "named"), FIELDS, ids=[next(iter(f)) for _, f, _ in FIELDS])
def test_a_field(method: str, fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    error = refused(method, tmp_path, fields, {})
    check(error, method, named)


@pytest.mark.parametrize(("method", "more", "named"), ARGUMENTS, ids=[next(iter(f)) for _, f, _ in ARGUMENTS])
def test_an_argument(method: str, more: dict[str, Any], named: str, tmp_path: Path) -> None:
    check(refused(method, tmp_path, {}, more), method, named)


def check(error: ConfigError, method: str, named: str) -> None:
    assert named.replace("\\", "") in error.message
    assert error.message.startswith(TRAINERS[method][0].__name__)
    assert error.hint


def test_the_guide_names_them_all() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "trl.md").read_text()
    assert not [
        name for name in (*refused_names._FIELDS, *refused_names._ARGUMENTS) if f"`{name}`" not in guide
    ]


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    check(refused("sft", tmp_path, {}, {}), "sft", "a run of 2 processes")


def test_a_model_of_several_ranks(tmp_path: Path) -> None:
    with HostModel.from_pretrained(small_model("llama"), device="cpu", dtype="float32") as model:
        model.ranks = Ranks()
        model.ranks.world = 4
        check(refused("sft", tmp_path, {}, {"model": model}), "sft", "a run of 4 processes")


def test_the_control_is_accepted(tmp_path: Path) -> None:
    """Without any of them the same call gets as far as loading the model."""
    error = refused("sft", tmp_path, {}, {"processing_class": tokenizer()})
    assert "no/such/model" in error.message


# A HostModel with other settings than the arguments.


HOST: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"adam_beta2": 0.95}, "adam_beta2=0.95"),
    ({}, {"optim": "sgd"}, "optim=sgd"),
    ({}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    ({"max_grad_norm": None}, {}, "update: eager"),
    ({}, {"router_aux_loss_coef": 0.1}, "routers' auxiliary loss"),
]


@pytest.mark.parametrize(("built", "fields", "named"), HOST, ids=[named for _, _, named in HOST])
def test_a_host_model_of_other_settings(
    built: dict[str, Any], fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    kind = "mixtral" if "router_aux_loss_coef" in fields else "llama"
    with HostModel.from_pretrained(small_model(kind), device="cpu", dtype="float32", **built) as host:
        with pytest.raises(ConfigError, match=named) as caught:
            settings.host_of(host, arguments("sft", tmp_path, **fields))
        assert caught.value.hint


@pytest.mark.parametrize("place", ["cpu", "cuda:1", "cuda", "cuda:0"])
def test_a_host_model_on_another_device(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 0))
    with HostModel.from_pretrained(small_model("llama"), device="cpu", dtype="float32") as host:
        host.device = torch.device(place)
        if place in ("cuda", "cuda:0"):
            settings._check(host, arguments("plain", tmp_path))
            return
        with pytest.raises(ConfigError, match=f"on {place}, the trainer's arguments say cuda:0") as caught:
            settings._check(host, arguments("plain", tmp_path))
        assert caught.value.hint


def test_settings_of_the_arguments(tmp_path: Path) -> None:
    """What becomes of them in HostModel."""
    fields = {
        "optim": "lion_32bit",
        "adam_beta1": 0.8,
        "seed": random.Random(0).randrange(99),
        "gradient_checkpointing": False,
        "model_init_kwargs": {"attn_implementation": "eager", "revision": "abc", "trust_remote_code": True},
    }
    args = arguments("sft", tmp_path, **fields)
    found = settings.settings_of(args, "some/model")
    assert found == {
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "eager",
        "experts_implementation": "auto",
        "trust_remote_code": True,
        "model_revision": "abc",
        "activations": "auto",
        "update": "deferred",
        "deterministic": False,
        "seed": args.seed,
        "adam_beta1": 0.8,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "optim": "lion",
        "neftune_noise_alpha": None,
    }
    assert settings.settings_of(arguments("dpo", tmp_path, bf16=True), "some/model")["dtype"] == "bfloat16"
    assert settings.settings_of(arguments("dpo", tmp_path), "some/model")["activations"] == "recompute"


def test_a_launcher_numbers_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK makes the device of the arguments `cpu:0`, or `cuda:1`."""
    args = arguments("sft", tmp_path)
    for given, device in {"cpu:0": "cpu", "cuda:1": "cuda:1"}.items():
        monkeypatch.setattr(type(args), "device", property(lambda self, it=given: torch.device(it)))
        assert settings.settings_of(args, "some/model")["device"] == device
