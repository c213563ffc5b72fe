"""A small model, calls of it that fail, and what they must leave as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained

Call = Callable[[hz.HostModel], object]


def host(update: str = "deferred", dtype: str = "float32", **settings: Any) -> hz.HostModel:
    values: dict[str, Any] = {
        "max_grad_norm": None if update == "eager" else 0.5,
        "update": update,
        **settings,
    }
    return from_pretrained(zoo.build("llama"), device="cpu", dtype=dtype, skip_memory_check=True, **values)


def batch(step: int = 0) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch("llama", batch_size=1, length=8, seed=10 * step + m + 1) for m in range(2)]


def train(model: hz.HostModel, step: int) -> None:
    model.train_step(batch(step), lr=3e-3, weight_decay=0.01)


def digest(model: hz.HostModel) -> str:
    """Of every byte that outlives a step, as it is without flushing anything."""
    found = hashlib.sha256(str(model.steps_done).encode())
    for region, runs in model.store._runs.items():
        if region not in ("grads", "grad_slabs"):
            for run in runs:
                found.update(run.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
