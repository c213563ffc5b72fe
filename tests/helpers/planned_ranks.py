"""What one of several ranks allocates, run in the processes of a `RankPool`."""

from __future__ import annotations

from typing import Any

import torch

import horizon_lm as hz
from planned_models import SMALL


def allocated(settings: dict[str, Any], count: int, tokens: int) -> dict[str, int]:
    """Bytes by part after a step of `count` micro-batches."""
    chosen = hz.ModelSettings(device="cpu", skip_memory_check=True, **settings)
    model = hz.HostModel.from_config(SMALL, chosen)
    assert model.ranks.world > 1
    ids = torch.arange(tokens).view(1, tokens)
    model.train_step([{"input_ids": ids, "labels": ids}] * count, lr=0.0)
    ops = model.engine.ops
    return {
        **model.store.num_bytes,
        "weight_slots": ops.weight_slots.num_bytes,
        "gradient_slots": ops.gradient_slots.num_bytes,
        "shares": ops.updates.shards.num_bytes,
    }
