"""Runs with an adapter: a small base model in a folder, settings, and PEFT's own view of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from horizon_lm.config import TrainConfig
from horizon_lm.data import train_tokenizer
from small_runs import LLAMA, values, write_text

IDS = torch.arange(24).reshape(2, 12) * 7 % 300


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a model of random weights and its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=300)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    train_tokenizer(["the store holds every weight"] * 50, 300).save_pretrained(folder)
    return folder


def adapter_values(text: Path, run: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that trains LoRA on `base`, or what `changes` say."""
    asked = {"adapter": "lora", "lora_r": 4, "model_name_or_path": str(base), **changes}
    found = values(text, run, **asked)
    return {k: v for k, v in found.items() if k not in ("init_model", "train_tokenizer_vocab_size")}


def adapter_settings(text: Path, run: Path, base: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(adapter_values(text, run, base, **changes))


def changed_copy(base: Path, target: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
    """Copy a model, with one bit of one weight flipped."""
    shutil.copytree(base, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def by_peft(folder: Path, base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load an adapter as its users do."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def state_of(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of all that is trained."""
    found = {p.name: p.read_bytes() for p in sorted(checkpoint.rglob("unit-*.safetensors"))}
    assert found, checkpoint
    return found


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def run(text: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with three checkpoints."""
    from horizon_lm.training.train import train

    folder = tmp_path_factory.mktemp("runs") / "run"
    train(adapter_settings(text, folder, base, max_steps=6, save_steps=2))
    return folder
