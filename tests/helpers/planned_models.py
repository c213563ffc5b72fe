"""A small model for the planner."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.config.adapters import AdapterSettings
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.outline_cache import OutlineCache

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
    """Settings of a model that need not exist: an adapter's base is a folder with a configuration alone."""
    model = values.pop("init_model", SMALL)
    if values.get("adapter", "none") == "none":
        return TrainConfig(init_model=model, datasets=["none.txt"], **values)
    return TrainConfig(model_name_or_path=folder_of(model), datasets=["none.txt"], **values)


def folder_of(model: dict[str, Any]) -> str:
    """A folder with the model's configuration, and no weights."""
    return _folder_of(json.dumps(model))


@cache
def _folder_of(model: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="planned-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(model)
    return str(folder)


def outline_of(config: TrainConfig) -> Outline:
    """What is found of a model and a shape is found once for all tests: it is most of a plan's time."""
    return Outline(partial(model_config, config), config, known(config))


def known(config: TrainConfig) -> OutlineCache:
    decides = (
        config.init_model or config.model_name_or_path,
        config.dtype,
        config.attn_implementation,
        config.mlp_tile_tokens,
        *(getattr(config, key) for key in AdapterSettings.__annotations__),
    )
    return _known(repr(decides))


@cache
def _known(model: str) -> OutlineCache:
    return OutlineCache()
