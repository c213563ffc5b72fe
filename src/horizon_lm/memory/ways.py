"""The ways to save memory: one table, for the check before a run, the planner and out-of-memory hints.

What a way saves is never written down: the settings that it changes go through the same functions that size
the store and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Generic, NamedTuple, TypeVar

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.words import size

AnySettings = TypeVar("AnySettings", bound=ModelSettings)
Changes = dict[str, Any]  # setting -> value
# Bytes short under other settings by memory (host, device, locked, disk); negative where they fit. Raises
# ConfigError or UnsupportedModelError for settings that do not suit the model.
Shortages = Callable[[AnySettings], Mapping[str, int]]

_FEWEST_LOSS_TOKENS, _FEWEST_TILE_TOKENS = 256, 1024
_SHOWN = 3  # suggestions in a hint


class Results(IntEnum):
    """What a way does to the trained weights."""

    SAME = 0  # bitwise identical
    ROUNDING = 1  # sums in another order
    OTHER = 2  # another computation


@dataclass(frozen=True)
class Way:
    """One way to save memory.

    changes: the settings that it changes; empty if it does not apply to these settings. memory: where it may
    save something; what a device takes lies in host memory if the device is the CPU.
    """

    changes: Callable[[ModelSettings], Changes]
    results: Results
    memory: frozenset[str]


def _fewer_slots(settings: ModelSettings) -> Changes:
    return {key: 2 for key in ("slots", "grad_slots") if getattr(settings, key) > 2}


def _no_blocks(settings: ModelSettings) -> Changes:
    return {"checkpoint_interval": 1} if settings.checkpoint_interval > 1 else {}


def _recompute(settings: ModelSettings) -> Changes:
    return {} if settings.activations in ("auto", "recompute") else {"activations": "recompute"}


def _inputs_on_the_host(settings: ModelSettings) -> Changes:
    return {} if settings.boundaries == "host" else {"boundaries": "host"}


def _inputs_on_the_device(settings: ModelSettings) -> Changes:
    return {} if settings.boundaries in ("auto", "device") else {"boundaries": "device"}


def _planned_residents(settings: ModelSettings) -> Changes:
    """As many as the planner chooses, on a device with memory of its own; none without a plan."""
    return {} if settings.device == "cpu" or settings.resident == "auto" else {"resident": "auto"}


def _fewer_residents(settings: ModelSettings) -> Changes:
    if isinstance(settings.resident, int):
        return {"resident": settings.resident // 2} if settings.resident else {}
    return {"resident": 0} if settings.resident not in ("auto", []) else {}


def _more_rounds(settings: ModelSettings) -> Changes:
    """The next number of rounds that divides the micro-batches."""
    if not isinstance(settings, TrainConfig):
        return {}
    count = settings.gradient_accumulation_steps
    rounds = 1 if settings.rounds == "auto" else settings.rounds
    more = next((n for n in range(rounds + 1, count + 1) if count % n == 0), None)
    return {} if more is None else {"rounds": more}


def _one_round(settings: ModelSettings) -> Changes:
    """Gradients that wait between rounds take memory."""
    return {} if settings.rounds in ("auto", 1) else {"rounds": 1}


def _sums_on_the_device(settings: ModelSettings) -> Changes:
    return {"round_sums": "device"} if _sums_lie_elsewhere(settings, "device") else {}


def _sums_on_the_host(settings: ModelSettings) -> Changes:
    return {"round_sums": "host"} if _sums_lie_elsewhere(settings, "host") else {}


def _sums_lie_elsewhere(settings: ModelSettings, place: str) -> bool:
    return settings.rounds not in ("auto", 1) and settings.round_sums != place


def _smaller_micro_batches(settings: ModelSettings) -> Changes:
    """The largest proper part, so that a step has as many sequences as before."""
    if not isinstance(settings, TrainConfig) or settings.per_device_train_batch_size == 1:
        return {}
    rows = settings.per_device_train_batch_size
    less = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)
    micro_batches = settings.gradient_accumulation_steps * (rows // less)
    return {"per_device_train_batch_size": less, "gradient_accumulation_steps": micro_batches}


def _fewer_logits(settings: ModelSettings) -> Changes:
    tokens = settings.loss_chunk_tokens
    few = isinstance(tokens, int) and tokens <= _FEWEST_LOSS_TOKENS
    return {} if few else {"loss_chunk_tokens": _FEWEST_LOSS_TOKENS}


def _tiles(settings: ModelSettings) -> Changes:
    if not isinstance(settings, TrainConfig):
        return {}
    tile = max(_FEWEST_TILE_TOKENS, settings.max_length // 8)
    now = settings.mlp_tile_tokens or settings.per_device_train_batch_size * settings.row_tokens
    return {"mlp_tile_tokens": tile} if now > tile else {}


def _one_gradient_slot(settings: ModelSettings) -> Changes:
    return {"grad_slots": 1} if settings.grad_slots > 1 else {}


def _one_slab(settings: ModelSettings) -> Changes:
    return {"grad_slabs": 1} if settings.update_mode == "eager" and settings.grad_slabs > 1 else {}


def _eager(settings: ModelSettings) -> Changes:
    """Updates as gradients arrive, of which none are stored then: not with what looks at all of them."""
    if settings.update_mode == "eager":
        return {}
    changes: Changes = {"max_grad_norm": None} if settings.max_grad_norm else {}
    if settings.nonfinite == "skip":
        changes["nonfinite"] = "raise"
    if settings.update != "auto":
        changes["update"] = "eager"
    return changes


def _narrow_moments(settings: ModelSettings) -> Changes:
    return {"moment_dtype": "bfloat16"} if settings.moment_dtype == "float32" else {}


def _narrow_weights(settings: ModelSettings) -> Changes:
    return {"dtype": "bfloat16"} if settings.dtype == "float32" else {}


def _one_moment(settings: ModelSettings) -> Changes:
    return {"optim": "lion"} if settings.optim in ("adamw", "adam") else {}


def _shorter_rows(settings: ModelSettings) -> Changes:
    if not isinstance(settings, TrainConfig) or settings.max_length <= 2:
        return {}
    return {"max_length": settings.max_length // 2}


def _fewer_micro_batches(settings: ModelSettings) -> Changes:
    if not isinstance(settings, TrainConfig) or settings.gradient_accumulation_steps == 1:
        return {}
    fewer = settings.gradient_accumulation_steps // 2
    rounds = 1 if settings.rounds == "auto" else settings.rounds
    return {"gradient_accumulation_steps": fewer} | ({"rounds": 1} if fewer % rounds else {})


def _has_frozen(settings: ModelSettings) -> bool:
    """Whether part of the model is frozen, as far as settings tell."""
    return settings.has_adapter or bool(settings.freeze or settings.train)


def _adapter(settings: ModelSettings) -> Changes:
    """An adapter instead of the model, whose parameters then need neither gradients nor moments."""
    return {} if settings.has_adapter else {"adapter": "lora"}


def _eight_bits(settings: ModelSettings) -> Changes:
    is_wide = settings.base_dtype in ("auto", "bfloat16")
    return {"base_dtype": "int8"} if is_wide and _has_frozen(settings) else {}


def _four_bits(settings: ModelSettings) -> Changes:
    return {"base_dtype": "nf4"} if settings.base_dtype != "nf4" and _has_frozen(settings) else {}


def _adapter_on_four_bits(settings: ModelSettings) -> Changes:
    return {"adapter": "lora", "base_dtype": "nf4"} if not _has_frozen(settings) else {}


def _narrow_export(settings: ModelSettings) -> Changes:
    """The disk's: the trained model in two bytes a parameter."""
    if not isinstance(settings, TrainConfig) or (settings.save_dtype or settings.dtype) == "bfloat16":
        return {}
    return {"save_dtype": "bfloat16"}


_DEVICE, _HOST, _DISK = frozenset({"device", "host"}), frozenset({"host"}), frozenset({"disk"})

# Ways that keep the results come first, then by what they cost in speed or in what is computed.
WAYS = (
    Way(_fewer_slots, Results.SAME, _DEVICE),
    Way(_planned_residents, Results.SAME, _DEVICE),
    Way(_fewer_residents, Results.SAME, _DEVICE),
    Way(_no_blocks, Results.SAME, _DEVICE),
    Way(_recompute, Results.SAME, _DEVICE),
    Way(_inputs_on_the_host, Results.SAME, _DEVICE),
    Way(_inputs_on_the_device, Results.SAME, _HOST),
    Way(_more_rounds, Results.SAME, _DEVICE),
    Way(_sums_on_the_host, Results.SAME, frozenset({"device"})),
    Way(_sums_on_the_device, Results.SAME, _HOST),
    Way(_one_round, Results.SAME, _HOST),
    Way(_one_slab, Results.SAME, _HOST),
    Way(_one_gradient_slot, Results.SAME, _DEVICE),
    Way(_smaller_micro_batches, Results.ROUNDING, _DEVICE),
    Way(_fewer_logits, Results.ROUNDING, _DEVICE),
    Way(_tiles, Results.ROUNDING, _DEVICE),
    Way(_eager, Results.OTHER, _HOST),
    Way(_narrow_moments, Results.OTHER, _HOST),
    Way(_narrow_weights, Results.OTHER, _DEVICE),
    Way(_one_moment, Results.OTHER, _HOST),
    Way(_adapter, Results.OTHER, _DEVICE),
    Way(_eight_bits, Results.OTHER, _HOST),
    Way(_four_bits, Results.OTHER, _HOST),
    Way(_adapter_on_four_bits, Results.OTHER, _HOST),
    Way(_narrow_export, Results.OTHER, _DISK),
    Way(_shorter_rows, Results.OTHER, _DEVICE),
    Way(_fewer_micro_batches, Results.OTHER, _DEVICE),
)


@dataclass(frozen=True)
class Suggestion:
    """Settings that save `bytes`, by one way or by several `together`. is_enough: whether they suffice.
    results: what they do to the trained weights."""

    changes: Changes
    bytes: int
    is_enough: bool
    results: Results
    together: bool = False

    def __str__(self) -> str:
        if self.together:
            return f"{written(self.changes)} together save {size(self.bytes)}"
        text = f"{written(self.changes)} saves {size(self.bytes)}"
        return text if self.is_enough else f"{text} (not enough alone)"


def written(changes: Changes) -> str:
    """Settings as one would write them in a command."""
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in changes.items())


def hint(settings: AnySettings, shortages: Shortages[AnySettings], otherwise: str) -> str:
    """The best three suggestions; fewer end with `otherwise`, what helps besides settings."""
    shown = [str(found) for found in suggest(settings, shortages)[:3]]
    return "; ".join(shown if len(shown) == 3 else [*shown, otherwise])


def next_smaller(config: TrainConfig) -> str:
    """The first way to save device memory, as one would write it: for a run whose device ran out of memory.

    How much was missing is not known then, so nothing is said of what it saves. Settings left to the planner
    are skipped: it has chosen already.
    """
    found = (way.changes(config) for way in WAYS if "device" in way.memory)
    return written(next((changes for changes in found if changes and "auto" not in changes.values()), {}))


def suggest(settings: AnySettings, shortages: Shortages[AnySettings]) -> list[Suggestion]:
    """Every way that saves some of the memory that is shortest: those that suffice alone in the order of the
    table, then the others, the largest first. If none suffices alone, several that do together come first.
    If one that keeps the results suffices, no other computation is suggested.
    """
    search = _Search(settings, shortages)
    alone = search.alone()
    if any(found.is_enough and found.results is Results.SAME for found in alone):
        alone = [found for found in alone if found.results is not Results.OTHER]
    enough = [found for found in alone if found.is_enough]
    rest = sorted((found for found in alone if not found.is_enough), key=lambda found: -found.bytes)
    return [*(enough or search.together()), *rest]


class _Left(NamedTuple):
    """Bytes still short after some changes: of the memory that was shortest, and of all."""

    changes: Changes
    worst: int
    total: int


class _Search(Generic[AnySettings]):
    def __init__(self, settings: AnySettings, shortages: Shortages[AnySettings]) -> None:
        self._settings, self._shortages = settings, shortages
        found = shortages(settings)
        self._worst = max(found, key=found.__getitem__)
        self._now = self._measured({}, found)
        tried = [
            (way, self._after([way]))
            for way in WAYS
            if any(found.get(memory, 0) > 0 for memory in way.memory)
        ]
        self._useful = [(w, left) for w, left in tried if left is not None and left.total < self._now.total]

    def alone(self) -> list[Suggestion]:
        """Each way that saves some of the memory that is shortest, in the order of the table."""
        found = self._useful
        return [self._suggestion(left, [way]) for way, left in found if left.worst < self._now.worst]

    def together(self) -> list[Suggestion]:
        """The first ways of the table that suffice, without those that the others make needless; or none."""
        taken: list[Way] = []
        best = self._now
        for way, _ in self._useful:
            left = self._after([*taken, way])
            if left is not None and left.total < best.total:
                taken, best = [*taken, way], left
            if best.total == 0:
                break
        else:
            return []
        for way in list(taken):
            fewer = [other for other in taken if other is not way]
            left = self._after(fewer)
            if left is not None and left.total == 0:
                taken, best = fewer, left
        return [replace(self._suggestion(best, taken), together=True)]

    def _after(self, ways: Sequence[Way]) -> _Left | None:
        """With several ways, each applied after those before it; None for settings that do not suit."""
        settings, changes = self._settings, Changes()
        try:
            for way in ways:
                changes |= way.changes(settings)
                settings = self._settings.replace(**changes)
            return self._measured(changes, self._shortages(settings)) if changes else None
        except (ConfigError, UnsupportedModelError):
            return None

    def _measured(self, changes: Changes, shortages: Mapping[str, int]) -> _Left:
        return _Left(changes, shortages[self._worst], sum(max(0, short) for short in shortages.values()))

    def _suggestion(self, left: _Left, ways: Sequence[Way]) -> Suggestion:
        results = max(way.results for way in ways)
        return Suggestion(left.changes, self._now.worst - left.worst, left.total == 0, results)
