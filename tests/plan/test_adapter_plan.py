"""Plans of models with adapters, frozen parts and bases in few bits: the bytes that training allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import horizon_lm as hz
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan.predict import Sizes, costs_of, predict
from planned_models import SMALL, config_of, outline_of

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "tied": SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    "experts": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_r": 4, "target_modules": ATTENTION},
    "dora": {"adapter": "dora", "lora_r": 2, "target_modules": ["q_proj", "v_proj"]},
    "a module whole": {"adapter": "lora", "target_modules": ["v_proj"], "modules_to_save": ["k_proj"]},
    "frozen layers": {"freeze": [r"layers\.[01]\.", "embed_tokens"]},
    "two modules": {"train": [r"layers\.3\.self_attn", "norm"]},
}


def model_of(values: dict[str, Any], settings: dict[str, Any]) -> hz.HostModel:
    return hz.HostModel.from_config(values, ModelSettings(device="cpu", skip_memory_check=True, **settings))


def steps(config: TrainConfig, tokens: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (1, tokens), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_a_store_takes_the_planned_bytes(name: str, trained: str) -> None:
    """To the byte, by part; and the slots of a step of two micro-batches."""
    values = MODELS[name], TRAINED[trained]
    config = config_of(
        init_model=values[0], device="cpu", max_length=16, gradient_accumulation_steps=2, **values[1]
    )
    model = model_of(*values)
    outline = outline_of(config)
    assert outline.units == model.skeleton.units
    costs = costs_of(outline, config, load_profile("cpu-2core"), Sizes(1, 16, 2))
    assert costs.plan == model.engine.spec(2)
    model.train_step(steps(config, 16, 2), lr=0.0)
    found = model.memory_bytes()
    planned = predict(outline, config, load_profile("cpu-2core"), batch=1, tokens=16, micro_batches=2).host
    for part in ("weights", "residual", "exp_avg", "exp_avg_sq", "grads", "gradient_slots"):
        assert planned.get(part, 0) == found[part], part
    whole = outline_of(config_of(init_model=values[0], max_length=16))
    trainable = sum(unit.trainable_numel for unit in outline.units)
    assert trainable < 0.7 * sum(unit.trainable_numel for unit in whole.units)
    assert planned["exp_avg"] == 4 * trainable and planned["grads"] == 2 * trainable
