"""Choose the settings that a configuration leaves open, for one machine.

A staged search simulates candidates and returns the fastest one found that fits. Explicit settings are
pinned. `Planner.space` enumerates every combination (tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import chunk_choices
from horizon_lm.errors import ConfigError
from horizon_lm.machine.profile import Profile
from horizon_lm.plan import fit
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import Prediction, predict

_MAX_OPS = 1000  # micro-batches times layers; finer cuts are not searched
# A gain below this is not measurable: the choice that needs less memory or is simpler stays.
_TIE = 0.002


@dataclass(frozen=True)
class Choice:
    """A setting, its value and the reason. pinned: the configuration named it."""

    key: str
    value: Any
    reason: str
    pinned: bool


@dataclass
class Planner:
    """One model on one machine.

    pinned: keys set explicitly in the configuration. chooses_chunk: whether `choose` chose the loss chunk.
    """

    outline: Outline
    profile: Profile
    limits: Limits
    pinned: frozenset[str] = frozenset()
    chooses_chunk: bool = False
    _seen: dict[str, Prediction] = field(default_factory=dict)
    _outlines: dict[tuple, Outline] = field(default_factory=dict)

    def predict(self, config: TrainConfig) -> Prediction:
        key = config.model_dump_json()
        if key not in self._seen:
            self._seen[key] = predict(
                self._outline(config),
                config,
                self.profile,
                batch=config.sides * config.per_device_train_batch_size,
                tokens=config.max_length,
                micro_batches=config.gradient_accumulation_steps,
            )
        return self._seen[key]

    def _outline(self, config: TrainConfig) -> Outline:
        """The model under settings that change its structure."""
        key = config.dtype, config.mlp_tile_tokens
        self._outlines.setdefault((self.outline.dtype_name, self.outline.mlp_tile_tokens), self.outline)
        if key not in self._outlines:
            self._outlines[key] = Outline(self.outline.config, config).with_layers(self.outline.num_layers)
        return self._outlines[key]

    def fits(self, config: TrainConfig) -> bool:
        return not fit.shortfalls(config, self.predict(config), self.limits)

    def room_bytes(self, config: TrainConfig) -> int:
        """Bytes left of the memory that has least left; negative if the run does not fit."""
        return fit.room_bytes(config, self.predict(config), self.limits)

    # The space.

    def is_open(self, *keys: str) -> bool:
        return not self.pinned & set(keys)

    def batches(self, config: TrainConfig) -> list[tuple[int, int]]:
        """List (rows per micro-batch, micro-batches) that give tokens_per_step, largest first."""
        batch, count = config.per_device_train_batch_size, config.gradient_accumulation_steps
        if config.tokens_per_step is None:
            return [(batch, count)]
        assert config.tokens_per_step != "auto"  # `plan_run` has resolved it
        rows = max(1, config.tokens_per_step // config.row_tokens)
        cuts = [(b, rows // b) for b in range(rows, 0, -1) if rows % b == 0]
        if not self.is_open("per_device_train_batch_size"):
            cuts = [cut for cut in cuts if cut[0] == batch]
        if not self.is_open("gradient_accumulation_steps"):
            cuts = [cut for cut in cuts if cut[1] == count]
        if not cuts:
            raise ConfigError(
                f"tokens_per_step={config.tokens_per_step} ({rows} x {config.row_tokens}) does not go with "
                f"per_device_train_batch_size={batch}, gradient_accumulation_steps={count}",
                hint="unset one of the three",
            )
        return cuts

    def updates(self, config: TrainConfig) -> list[str]:
        if config.update != "auto":
            return [config.update]
        return ["deferred", "sync"] if config.update_mode == "deferred" else ["eager", "deferred", "sync"]

    def slots(self, config: TrainConfig) -> list[int]:
        return [config.slots] if self.profile.device == "cpu" or not self.is_open("slots") else [2, 3]

    def kept(self, config: TrainConfig) -> list[int]:
        """Numbers of layers, from the last one down, that may keep their activations."""
        is_open = config.activations == "auto" and config.checkpoint_interval == 1
        return list(range(self.outline.num_layers + 1)) if is_open else [0]

    def spilled(self, config: TrainConfig) -> list[int]:
        """Numbers of layers, from the first one up, that may spill their inputs."""
        is_open = config.boundaries == "auto" and self.profile.device != "cpu"
        return list(range(self.outline.num_layers + 1)) if is_open else [0]

    def make(
        self, config: TrainConfig, cut: tuple[int, int], update: str, slots: int, kept: int, spilled: int
    ) -> TrainConfig:
        layers = self.outline.num_layers
        changes: dict[str, Any] = {
            "per_device_train_batch_size": cut[0],
            "gradient_accumulation_steps": cut[1],
            "update": update,
            "slots": slots,
        }
        if config.activations == "auto":
            changes["activations"] = _listed("recompute", layers - kept, "keep", kept)
        threads = self.profile.update_threads if update != "sync" else None  # between steps: all cores
        if config.optimizer_threads == "auto" and threads is not None:
            changes["optimizer_threads"] = threads
        if config.boundaries == "auto":
            changes["boundaries"] = _listed("host", spilled, "device", layers - spilled)
        return config.replace(**changes)

    def space(self, config: TrainConfig) -> Iterator[TrainConfig]:
        """Enumerate every combination, whether it fits or not."""
        for cut, update, slots, kept, spilled in product(
            self.batches(config),
            self.updates(config),
            self.slots(config),
            self.kept(config),
            self.spilled(config),
        ):
            yield self.make(config, cut, update, slots, kept, spilled)

    # The search.

    def choose(self, config: TrainConfig) -> TrainConfig:
        """Return the fastest combination found that fits. Raises DoesNotFitError if there is none."""
        cuts = self.batches(config)
        layers = self.outline.num_layers
        coarse = [cut for cut in cuts if cut[1] * layers <= _MAX_OPS] or cuts[:1]
        update, slots = self.updates(config)[0], self.slots(config)[0]
        spills = sorted({self.spilled(config)[0], self.spilled(config)[-1]})
        firsts: list[tuple[float, tuple[int, int], int]] = []
        for cut, spilled in product(coarse, spills):
            made = self.make(config, cut, update, slots, 0, spilled)
            if self.fits(made):
                firsts.append((self.predict(made).seconds, cut, spilled))
        if not firsts:
            smallest = self.make(
                config,
                cuts[-1] if cuts[-1][1] * layers <= _MAX_OPS else coarse[-1],
                update,
                slots,
                0,
                spills[-1],
            )
            if not config.skip_memory_check:
                asked = smallest.replace(update=config.update)  # hints start from what the user asked
                fit.check(asked, self.predict(asked), self.limits, self.predict)
            least = self.chunks(smallest)[-1:]
            return smallest.replace(loss_chunk_tokens=least[0]) if least else smallest
        best: list[tuple[float, TrainConfig]] = []
        for _, cut, spilled in sorted(firsts)[:6]:
            kept = self._most_kept(config, cut, update, slots, spilled)
            spilled = self._least_spilled(config, cut, update, slots, kept, spilled)
            made = self.make(config, cut, update, slots, kept, spilled)
            best.append((self.predict(made).seconds, made))
        chosen = min(best, key=lambda row: row[0])[1]
        return self._with_largest_chunk(self._refine(config, chosen))

    def chunks(self, config: TrainConfig) -> list[int]:
        """List the loss chunks to choose from, largest first; empty if there is no choice.

        At most one of them holds a whole micro-batch.
        """
        if self.profile.device == "cpu" or config.loss_chunk_tokens != "auto":
            return []
        tokens = config.per_device_train_batch_size * config.row_tokens
        found = chunk_choices(self.outline.vocabulary)
        return [size for size, less in zip(found, [*found[1:], 0], strict=True) if less < tokens]

    def _with_largest_chunk(self, chosen: TrainConfig) -> TrainConfig:
        """Choose the largest loss chunk that fits without another change."""
        for tokens in self.chunks(chosen):
            self.chooses_chunk = True
            other = chosen.replace(loss_chunk_tokens=tokens)
            if self.fits(other):
                return other
        return chosen

    def _most_kept(
        self, config: TrainConfig, cut: tuple[int, int], update: str, slots: int, spilled: int
    ) -> int:
        """Find the most layers that fit by bisection, since each kept layer takes more memory."""
        low, high = 0, self.kept(config)[-1]
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(self.make(config, cut, update, slots, middle, spilled)):
                low = middle
            else:
                high = middle - 1
        return low

    def _least_spilled(
        self, config: TrainConfig, cut: tuple[int, int], update: str, slots: int, kept: int, spilled: int
    ) -> int:
        low, high = self.spilled(config)[0], spilled
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.make(config, cut, update, slots, kept, middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def _refine(self, config: TrainConfig, chosen: TrainConfig) -> TrainConfig:
        """Try other update modes and one more slot."""
        best = self.predict(chosen).seconds
        for update, slots in product(self.updates(config), self.slots(config)):
            other = chosen.replace(update=update, slots=slots)
            if self.fits(other) and self.predict(other).seconds < best * (1 - _TIE):
                chosen, best = other, self.predict(other).seconds
        return chosen


def _listed(first: str, first_count: int, second: str, second_count: int) -> str | list[str]:
    """A setting by layer; one word if all layers are alike."""
    if not first_count:
        return second
    return [f"{first}*{first_count}", f"{second}*{second_count}"] if second_count else first
