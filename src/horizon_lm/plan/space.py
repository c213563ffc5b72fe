"""The combinations of settings among which the planner chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.config.memory import TRAINABLE
from horizon_lm.engine.homes import reduction_of, resident_order
from horizon_lm.engine.policies import no_selection
from horizon_lm.errors import ConfigError
from horizon_lm.machine.profile import Profile
from horizon_lm.plan.outline import Outline
from horizon_lm.schedule.step_spec import ATTENTION, KEEP, PRODUCTS, RECOMPUTE


@dataclass(frozen=True)
class Cut:
    """How the rows of a step are cut. sums: where gradients wait between rounds; "" with one round. world:
    ranks, among which the micro-batches are divided."""

    batch: int
    micro_batches: int
    rounds: int = 1
    sums: str = ""
    world: int = 1

    @property
    def positions(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.micro_batches // self.world)

    @property
    def round_size(self) -> int:
        return self.positions // self.rounds


@dataclass(frozen=True)
class Candidate:
    """A combination of settings.

    resident: number of whole units along `Space.order`; None: as configured. split: the trainable parts of
    all units are resident too. keep, products, attention: numbers of layers, from the last one down in this
    order. spilled: layers, from the first one up, that spill their inputs.
    """

    cut: Cut
    update: str
    slots: int
    resident: int | None = None
    split: bool = False
    keep: int = 0
    products: int = 0
    attention: int = 0
    spilled: int = 0

    def with_kept(self, counts: dict[str, int]) -> Candidate:
        found = [counts.get(policy, 0) for policy in (KEEP, PRODUCTS, ATTENTION)]
        return replace(self, keep=found[0], products=found[1], attention=found[2])


class Space:
    """What a configuration leaves open on a machine. pinned: keys set explicitly."""

    def __init__(
        self,
        config: TrainConfig,
        outline: Outline,
        profile: Profile,
        pinned: frozenset[str],
        world: int = 1,
    ) -> None:
        self.config, self.outline, self.profile, self._pinned = config, outline, profile, pinned
        self.world = world
        self.is_cpu = profile.device == "cpu"
        self.layers = outline.num_layers

    @property
    def is_shared(self) -> bool:
        """Whether steps work on shares of units, as in `StepSpec`."""
        return reduction_of(self.config, self.world) != ""

    def is_open(self, *keys: str) -> bool:
        return not self._pinned & set(keys)

    def batches(self) -> list[tuple[int, int]]:
        """List (rows per micro-batch, micro-batches) that give tokens_per_step, largest first."""
        config = self.config
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

    def cuts(self) -> list[Cut]:
        """List the cuts of a step into micro-batches and rounds, the simplest first."""
        batches = self.batches()
        found = [
            Cut(batch, count, rounds, sums, self.world)
            for batch, count in batches
            for rounds in self.rounds(count)
            for sums in self.sums(count, rounds)
        ]
        if not found:
            raise self._no_cut(sorted({-(-count // self.world) for _, count in batches}))
        return sorted(found, key=lambda cut: cut.rounds)

    def _no_cut(self, counts: list[int]) -> ConfigError:
        """Explain why `rounds` goes with none of the numbers of micro-batches (of each rank)."""
        rounds, adds = self.config.rounds, self.config.round_sums == "add" and not self.is_shared
        assert rounds != "auto"  # one round always goes
        options = set(counts) if adds else {n for count in counts for n in _divisors(count)}
        nearest = min(sorted(options), key=lambda n: abs(n - rounds))
        if any(count % rounds == 0 for count in counts):
            return ConfigError(
                f"round_sums=add needs one micro-batch per round, but rounds={rounds} is not a number of "
                f"micro-batches that tokens_per_step allows ({_some(counts)})",
                hint=f"set rounds={nearest} or round_sums=host",
            )
        return ConfigError(
            f"rounds={rounds} does not divide any number of micro-batches that tokens_per_step allows "
            f"({_some(counts)})",
            hint=f"set rounds={nearest} or rounds=auto",
        )

    def rounds(self, micro_batches: int) -> list[int]:
        """Numbers of rounds into which the micro-batches of each rank can be cut."""
        positions = -(-micro_batches // self.world)
        if self.config.rounds != "auto":
            return [self.config.rounds] if positions % self.config.rounds == 0 else []
        if self.is_cpu:
            return [1]
        # Configured micro-batches may leave some ranks with fewer; settings know the rounds of all of them.
        return [
            n
            for n in _divisors(positions)
            if micro_batches % n == 0 or self.config.tokens_per_step is not None
        ]

    def sums(self, micro_batches: int, rounds: int) -> list[str]:
        if rounds == 1:
            return [""]
        options = ["device", "host", *(["add"] if rounds == micro_batches and not self.is_shared else [])]
        asked = self.config.round_sums
        if asked == "auto" and self.is_cpu:
            return ["device"]
        if asked == "add" and self.is_shared:  # as `host` then
            return [asked]
        return options if asked == "auto" else [asked] if asked in options else []

    def updates(self) -> list[str]:
        config = self.config
        if config.update != "auto":
            return [config.update]
        return ["deferred", "sync"] if config.update_mode == "deferred" else ["eager", "deferred", "sync"]

    def slots(self) -> list[int]:
        return [self.config.slots] if self.is_cpu or not self.is_open("slots") else [2, 3]

    def residents(self) -> list[int | None]:
        """Numbers of units, along `resident_order`, that may live on the device."""
        if self.config.resident != "auto":
            return [None]
        return [0] if self.is_cpu else list(range(len(self.order()) + 1))

    def splits(self) -> list[bool]:
        """Whether trainable parts may be resident while frozen parts are streamed: those of an adapter, which
        are small."""
        can_split = self.config.has_adapter and not self.is_cpu and not self.is_shared
        return [True, False] if can_split and self.config.resident == "auto" else [False]

    def order(self) -> list[int]:
        """Units in the order in which they become resident as a whole. Packed ones never do."""
        return [u for u in resident_order(self.outline) if not self.outline.units[u].packed_numel]

    def placed(self, number: int, split: bool) -> int | str | list[str]:
        """The setting `resident` for that many whole units, and trainable parts: a number if that says it."""
        order = self.order()[:number]
        names = [self.outline.units[unit].name for unit in order]
        if split:
            return [TRAINABLE, *names] if names else TRAINABLE
        return number if order == resident_order(self.outline)[:number] else names

    @property
    def chooses_policies(self) -> bool:
        return self.config.activations == "auto" and self.config.checkpoint_interval == 1

    def policies(self) -> list[str]:
        """Policies besides recompute. A CPU computes in the memory that it would keep them in."""
        if not self.chooses_policies:
            return []
        if self.is_cpu or no_selection(self.config):
            return [KEEP]
        # Eager attention has no kernel whose result could be kept.
        few = [PRODUCTS, KEEP]
        return few if self.config.attn_implementation == "eager" else [ATTENTION, *few]

    def kept(self) -> Iterator[dict[str, int]]:
        """Every number of layers under each policy."""
        names = self.policies()
        for counts in product(range(self.layers + 1), repeat=len(names)):
            if sum(counts) <= self.layers:
                yield dict(zip(names, counts, strict=True))

    def spilled(self) -> list[int]:
        """Numbers of layers, from the first one up, that may spill their inputs."""
        is_open = self.config.boundaries == "auto" and not self.is_cpu
        return list(range(self.layers + 1)) if is_open else [0]

    def make(self, candidate: Candidate) -> TrainConfig:
        """The configuration with the choices of a candidate."""
        config, cut = self.config, candidate.cut
        changes: dict[str, Any] = {
            "per_device_train_batch_size": cut.batch,
            "gradient_accumulation_steps": cut.micro_batches,
            "update": candidate.update,
            "slots": candidate.slots,
            "rounds": cut.rounds,
        }
        if cut.sums:
            changes["round_sums"] = cut.sums
        if config.resident == "auto":
            changes["resident"] = self.placed(candidate.resident or 0, candidate.split)
        if config.activations == "auto":
            left = self.layers - candidate.keep - candidate.products - candidate.attention
            counts = (left, candidate.attention, candidate.products, candidate.keep)
            changes["activations"] = listed((RECOMPUTE, ATTENTION, PRODUCTS, KEEP), counts)
        threads = self.profile.update_threads if candidate.update != "sync" else None  # or all cores
        if config.optimizer_threads == "auto" and threads is not None:
            changes["optimizer_threads"] = threads
        if config.boundaries == "auto":
            left = self.layers - candidate.spilled
            changes["boundaries"] = listed(("host", "device"), (candidate.spilled, left))
        return config.replace(**changes)

    def every(self) -> Iterator[TrainConfig]:
        """Enumerate every combination, whether it fits or not."""
        homes = list(product(self.residents(), self.splits()))
        for cut, update, slots, (resident, split), kept, spilled in product(
            self.cuts(), self.updates(), self.slots(), homes, self.kept(), self.spilled()
        ):
            if spilled + kept.get(KEEP, 0) <= self.layers:  # layers that keep spill nothing
                found = Candidate(cut, update, slots, resident, split, spilled=spilled)
                yield self.make(found.with_kept(kept))


def splits_units(config: TrainConfig) -> bool:
    """Whether the setting `resident` names the trainable parts of all units."""
    asked = config.resident
    return asked == TRAINABLE or (isinstance(asked, list) and TRAINABLE in asked)


def listed(words: tuple[str, ...], counts: tuple[int, ...]) -> str | list[str]:
    """A setting by layer; one word if all layers are alike."""
    found = [(word, count) for word, count in zip(words, counts, strict=True) if count]
    return found[0][0] if len(found) == 1 else [f"{word}*{count}" for word, count in found]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _some(counts: list[int]) -> str:
    shown = [*counts[:4], *(["..."] if len(counts) > 5 else []), *counts[max(4, len(counts) - 1) :]]
    return ", ".join(map(str, shown))
