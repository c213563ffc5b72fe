"""Find the size of a step from which on the device computes nearly all the time.

Weights cross the bus and are updated once a step (or round), whatever its tokens; those of all experts do, of
which a token visits a few. Only more tokens give the device more to compute meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.predict import Prediction
from horizon_lm.schedule import Lane

BUSY = 0.9  # share of a step that the device computes
_MOST_TOKENS = 1 << 25  # of a step
_CLOSE = 16  # the number found is at most one part in so many above the smallest
_LEANER: tuple[dict[str, Any], ...] = (
    {},
    {"boundaries": "host"},
    {"boundaries": "host", "activations": "recompute"},
)


def compute_share(found: Prediction) -> float:
    """The share of a step in which the device computes."""
    return found.lanes()[str(Lane.COMPUTE)] / found.seconds if found.seconds else 1.0


def busy_from(planner: Planner, chosen: TrainConfig, opened: Collection[str]) -> TrainConfig | None:
    """Return `chosen` with the fewest micro-batches a step of which the device computes `BUSY`, to one part
    in 16; None on a CPU, for several ranks, and if no step of up to 32 million tokens that fits is such a
    step.

    opened: settings that may change. If so many micro-batches do not fit on the device, inputs of layers go
    to host memory, and then all layers are recomputed.
    """
    if planner.profile.device == "cpu" or planner.network is not None:
        return None
    if chosen.round_sums == "add" and chosen.rounds != 1:  # each micro-batch is a round
        return None
    for changes in _LEANER:
        if changes.keys() <= set(opened):
            config = chosen.replace(**changes)
            number = _fewest(partial(_is_busy, planner, config), _most(config))
            found = None if number is None else _with(config, number)
            if found is not None and planner.fits(found):
                return found
    return None


def _with(config: TrainConfig, rounds_of: int) -> TrainConfig:
    """The settings with `rounds_of` micro-batches in each round."""
    return config.replace(gradient_accumulation_steps=rounds_of * _rounds(config))


def _rounds(config: TrainConfig) -> int:
    return 1 if config.rounds == "auto" else config.rounds


def _most(config: TrainConfig) -> int:
    each = config.sides * config.per_device_train_batch_size * config.max_length
    return max(1, _MOST_TOKENS // (each * _rounds(config)))


def _is_busy(planner: Planner, config: TrainConfig, rounds_of: int) -> bool:
    return compute_share(planner.quickly(_with(config, rounds_of))) >= BUSY


def _fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number up to `most` that holds, to one part in 16, if larger ones hold as well."""
    low, high = 0, 1
    while not holds(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > max(1, high // _CLOSE):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
