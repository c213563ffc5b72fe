"""Adapters of PEFT under the trainers: TRL's own parameters, logs and references, and PEFT's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from trainer_pairs import Trained, assert_equal, build, parameters_of, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS = {"gradient_accumulation_steps": 2}
RUNS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("sft", "llama", {}, {"weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 5}),
    ("sft", "qwen3", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, STEPS),
    ("plain", "gemma", {"target_modules": ["q_proj", "v_proj"]}, STEPS),
    ("dpo", "llama", {}, {**STEPS, "eval_strategy": "steps", "eval_steps": 5}),
    ("dpo", "mixtral", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}, STEPS),
    ("kto", "qwen3", {"rank_pattern": {"v_proj": 2}}, STEPS),
]


def adapted(kind: str, seed: int = 1, **changes: Any) -> Any:
    """A PeftModel whose adapter has been trained, so to say: its matrices B are not 0."""
    torch.manual_seed(seed)
    model = get_peft_model(small_model(kind), LoraConfig(**{**LORA, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def given(method: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The trainer's arguments: `peft_config`, or for transformers' Trainer a PeftModel."""
    peft_config = LoraConfig(**{**LORA, **config})
    found: dict[str, Any] = {"peft_config": peft_config}
    if method == "plain":
        set_seed(42)
        found = {"model": get_peft_model(small_model(kind), peft_config)}
    if method in ("dpo", "kto"):
        found["ref_model"] = None
    return found


@pytest.mark.parametrize(
    ("method", "kind", "config", "changes"), RUNS, ids=[f"{method}-{kind}" for method, kind, _, _ in RUNS]
)
def test_ten_steps(
    method: str, kind: str, config: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    """A new adapter by peft_config, whose base is the reference."""
    trainers = [
        build(method, kind, tmp_path, ours=ours, trainer=given(method, kind, config), **changes)
        for ours in (True, False)
    ]
    before = [parameters_of(trainer) for trainer in trainers]
    assert before[0].keys() == before[1].keys()
    assert all(before[0][name].equal(value) for name, value in before[1].items())
    ours, theirs = (Trained.by(trainer) for trainer in trainers)
    assert_equal(ours, theirs)
    trained = {name for name, p in trainers[1].model.named_parameters() if p.requires_grad}
    trained = {name.removeprefix("base_model.model.") for name in trained}
    assert {name for name, value in ours.moved.items() if value.any()} == trained
    assert {p.name for unit in trainers[0].host.skeleton.units for p in unit.trainable} == trained
