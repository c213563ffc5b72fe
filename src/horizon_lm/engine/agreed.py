"""What ranks must have in common before a step: the call, its schedule, its data, and their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from horizon_lm.config import ModelSettings
from horizon_lm.config.base import resumable
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.micro_batches import MicroBatch


def of_model(units: Sequence[UnitLayout], settings: ModelSettings) -> dict[str, Any]:
    """The settings that results depend on, and the parameters of each unit."""
    free, values = resumable(type(settings), "free"), settings.to_dict()
    layout = {unit.name: xxhash.xxh3_128_hexdigest(repr(unit).encode()) for unit in units}
    return {"settings": {key: value for key, value in values.items() if key not in free}, "model": layout}


def of_data(micro_batches: Sequence[MicroBatch]) -> list[str]:
    """A hash of each micro-batch."""
    return [_hash(batch) for batch in micro_batches]


def _hash(batch: Mapping[str, torch.Tensor]) -> str:
    found = xxhash.xxh3_64()
    for name in sorted(batch):
        value = batch[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
