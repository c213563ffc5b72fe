"""What ranks must have in common before a step: the call, its schedule, its data, and their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from horizon_lm.config import ModelSettings
from horizon_lm.config.base import resumable
from horizon_lm.distributed.agreement import agree
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.engine.ops import Ops
from horizon_lm.engine.step import Step
from horizon_lm.errors import RankError
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.optim.optimizer import UpdateSettings
from horizon_lm.words import count


class Agreed:
    """What the ranks of a model have agreed on. is_apart: in a step of several ranks, or after one that was
    cut short, ranks may be at different collectives."""

    def __init__(self, ranks: Ranks, units: Sequence[UnitLayout], settings: ModelSettings, ops: Ops) -> None:
        self._ranks, self._units, self._settings, self._ops = ranks, units, settings, ops
        self._has_met = False  # whether ranks have compared their models
        self.is_apart = False

    def on(
        self, call: str, steps_done: int, step: Step | None = None, update: UpdateSettings | None = None
    ) -> None:
        """Raise the same ConfigError on all ranks unless they make the same call on the same data.

        Raises RankError after a step that was cut short. Collective.
        """
        if self._ranks.world == 1:
            return
        if self.is_apart:
            raise RankError(
                "an earlier step was cut short, and ranks may have stopped at different ops",
                hint="start all ranks again, from the last checkpoint",
            )
        if not self._has_met:
            agree(self._ranks, of_model(self._units, self._settings))
            # `auto` depends on the memory of the device.
            self._ops.set_loss_chunk(min(self._ranks.exchange(self._ops.policies.loss_chunk)))
            self._has_met = True
        values: dict[str, Any] = {"call": f"{call} after {count(steps_done, 'step')}"}
        values["update"] = update and vars(update)
        if step is not None:
            values |= {"micro-batches": step.data, "schedule": step.schedule.digest}
        agree(self._ranks, values)


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
