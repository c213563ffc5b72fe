"""A small model for the planner."""

from __future__ import annotations

from typing import Any

from horizon_lm.config import TrainConfig

GB = 10**9
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


def config_of(**values: Any) -> TrainConfig:
    model = values.pop("init_model", SMALL)
    return TrainConfig(init_model=model, datasets=["none.txt"], **values)
