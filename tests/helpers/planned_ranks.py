"""Planners and machines for shared steps; what a rank allocates, of several in processes of a `RankPool`."""

from __future__ import annotations

from typing import Any

import torch

import horizon_lm as hz
from horizon_lm.config import TrainConfig
from horizon_lm.machine.profile import Node, Profile, load_profile
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.run_plan import Planners
from planned_models import SMALL, outline_of


def node_of(**values: Any) -> Node:
    rates = {"gpus": 4, "cores": 32, "host_bytes": 1e9, "optimizer": 8e9, "peer": 1e10, "network": 1e9}
    seconds = {"peer_seconds": 1e-5, "network_seconds": 3e-5, "message_seconds": 1e-4}
    return Node.model_validate(rates | seconds | {"sources": {"peer": "test"}} | values)


def profile_of(node: Node | None = None, **values: Any) -> Profile:
    """A GPU as slow as the model is small."""
    found = load_profile("rtx3090").model_dump() | {"process_bytes": 0.0, "context_bytes": 0.0}
    found |= {"h2d": 2e9, "d2h": 2e9, "host": 2e10, "optimizer": 1e10} | values
    found |= {
        "matmul": {"bfloat16": 5e12, "float32": 2e12},
        "elementwise": {"bfloat16": 1e11, "float32": 1e11},
    }
    return Profile.model_validate(found).model_copy(update={"node": node or node_of()})


def planners_of(config: TrainConfig, profile: Profile) -> Planners:
    limits = Limits.of_profile(profile)
    return Planners(outline_of(config), profile, limits, frozenset(config.model_fields_set), None)


def allocated(settings: dict[str, Any], count: int, tokens: int) -> dict[str, int]:
    """Bytes by part after a step of `count` micro-batches."""
    chosen = hz.ModelSettings(device="cpu", skip_memory_check=True, **settings)
    model = hz.HostModel.from_config(SMALL, chosen)
    ids = torch.arange(tokens).view(1, tokens)
    model.train_step([{"input_ids": ids, "labels": ids}] * count, lr=0.0)
    ops = model.engine.ops
    return {
        **model.store.num_bytes,
        "weight_slots": ops.weight_slots.num_bytes,
        "gradient_slots": ops.gradient_slots.num_bytes,
        "shares": ops.updates.shards.num_bytes,
    }
