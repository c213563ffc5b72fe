"""Choose the settings that a configuration leaves open, for one machine.

A staged search simulates candidates and returns the fastest one found that fits. Explicit settings are
pinned. `Planner.space` enumerates every combination (tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import chunk_choices
from horizon_lm.machine.profile import Profile
from horizon_lm.plan import fit, search
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.fleet import Network
from horizon_lm.plan.outline import Outline, structure_of
from horizon_lm.plan.predict import MOST_VISITS, Prediction, Sizes, costs_of, prediction_of
from horizon_lm.plan.search import Search
from horizon_lm.plan.space import Candidate, Cut, Space
from horizon_lm.plan.work import Line
from horizon_lm.schedule.step_spec import EXACT, FAST

MOST_FOR_EXACT = 0.15  # the share of time that `reduction: auto` spends on bits that ranks do not change


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

    With several ranks, one of them: profile is its share of the machine (`Profile.of_rank`). network: None
    with one rank. pinned: keys set explicitly in the configuration. chooses_chunk: whether `choose` chose the
    loss chunk. opened: settings of residents and rounds that were `auto` for `choose`.
    """

    outline: Outline
    profile: Profile
    limits: Limits
    pinned: frozenset[str] = frozenset()
    chooses_chunk: bool = False
    opened: frozenset[str] = frozenset()
    network: Network | None = None
    _seen: dict[tuple, Prediction] = field(default_factory=dict)
    _outlines: dict[str, Outline] = field(default_factory=dict)

    def predict(self, config: TrainConfig, most_visits: int = MOST_VISITS) -> Prediction:
        """most_visits: see `prediction_of`."""
        key = config.model_dump_json(), most_visits
        if key not in self._seen:
            found = prediction_of(self.costs(config), most_visits)
            if most_visits < MOST_VISITS:  # one of hundreds, whose ops nobody looks at
                found = replace(found, step=replace(found.step, simulation=found.simulation.without_spans()))
            self._seen[key] = found
        return self._seen[key]

    def costs(self, config: TrainConfig) -> Costs:
        return costs_of(self._outline(config), config, self.profile, _sizes(config), self.network)

    def _outline(self, config: TrainConfig) -> Outline:
        """The model under settings that change its structure."""
        key = structure_of(config)
        self._outlines.setdefault(self.outline.structure, self.outline)
        if key not in self._outlines:
            self._outlines[key] = Outline(self.outline.config, config).with_layers(self.outline.num_layers)
        return self._outlines[key]

    @property
    def world(self) -> int:
        return 1 if self.network is None else self.network.fleet.world

    def fits(self, config: TrainConfig) -> bool:
        return not fit.shortfalls(config, self.predict(config), self.limits)

    def room_bytes(self, config: TrainConfig) -> int:
        """Bytes left of the memory that has least left; negative if the run does not fit. By a short step."""
        return fit.room_bytes(config, self.quickly(config), self.limits)

    def quickly(self, config: TrainConfig) -> Prediction:
        """Predict by a short step."""
        return self.predict(config, search.MOST_VISITS)

    def space(self, config: TrainConfig) -> Iterator[TrainConfig]:
        """Enumerate every combination, whether it fits or not."""
        return self.space_of(config).every()

    def space_of(self, config: TrainConfig) -> Space:
        return Space(config, self._outline(config), self.profile, self.pinned, self.world)

    def _search(self, config: TrainConfig) -> Search:
        def rest(settings: TrainConfig, found: Prediction) -> dict[str, int]:
            return fit.rest_bytes(settings, found, self.limits)

        machine = search.Machine(self.quickly, rest, self.costs, self.limits.device)
        return Search(self.space_of(config), machine)

    # The search.

    def choose(self, config: TrainConfig) -> TrainConfig:
        """Return the fastest combination found that fits. Raises DoesNotFitError if there is none.

        With several ranks `reduction: auto` is exact, unless fast makes the same combination much faster by
        figures of this hardware's links: bits do not follow from assumptions.
        """
        if self.network is None or config.reduction != "auto":
            return self._choose(config)
        chosen = self._choose(config.replace(reduction=EXACT))
        exact, fast = self.seconds_by_reduction(chosen)
        if exact <= fast * (1 + MOST_FOR_EXACT) or not self.knows_links:
            return chosen
        return self._choose(config.replace(reduction=FAST))

    @property
    def knows_links(self) -> bool:
        """Whether the profile has figures of links between ranks, of this machine if the plan is for it."""
        is_known = self.network is not None and bool(self.network.node.sources)
        return is_known and (self.profile.measured or not self.limits.here)

    def seconds_by_reduction(self, config: TrainConfig) -> tuple[float, float]:
        """Seconds of a step with gradients added exactly, and fast."""
        exact, fast = (self.predict(config.replace(reduction=reduction)) for reduction in (EXACT, FAST))
        return exact.seconds, fast.seconds

    def has_room(self, config: TrainConfig) -> bool:
        """Whether anything fits, by the leanest combinations alone: faster than `choose`."""
        return self._search(config).has_room()

    def _choose(self, config: TrainConfig) -> TrainConfig:
        space, found = self.space_of(config), self._search(config)
        self.opened = frozenset(key for key in ("resident", "rounds") if getattr(config, key) == "auto")
        batches = [batch * config.sides for batch, _ in space.batches()]
        if len(batches) > 2:
            self.outline.expect(Line("batch", config.max_length, max(2, min(batches)), max(batches) - 1))
        best = found.best()
        while best is not None and not self.fits(space.make(best)):  # the search looks at short steps
            best = found.smaller(best)
        if best is not None:
            return self._with_largest_chunk(space.make(best))
        smallest = space.make(found.least())
        if not config.skip_memory_check:
            # Hints start from what the user asked.
            residents = "auto" if config.resident == "auto" else smallest.resident
            asked = smallest.replace(update=config.update, resident=residents)
            fit.check(asked, self._pooling(asked), self.limits, self._pooling)
        least = self.chunks(smallest)[-1:]
        return smallest.replace(loss_chunk_tokens=least[0]) if least else smallest

    def with_more(self, config: TrainConfig, chosen: TrainConfig) -> tuple[str, TrainConfig] | None:
        """(policy, `chosen` with one more layer under it), of what `config` leaves open; None if no further
        layer would gain by another policy."""
        return self._search(config).with_more(chosen)

    def _pooling(self, config: TrainConfig) -> Prediction:
        """The prediction, with the number of residents chosen if it is open."""
        return self.predict(self.pooled(config) if config.resident == "auto" else config)

    def pooled(self, config: TrainConfig) -> TrainConfig:
        """The configuration with as few residents as host memory allows, or as many as the device holds."""
        rounds = 1 if config.rounds == "auto" else config.rounds
        batch, count = config.per_device_train_batch_size, config.gradient_accumulation_steps
        cut = Cut(batch, count, rounds, world=self.world)
        found = self._search(config.replace(resident="auto"))
        roomiest = found.roomiest(Candidate(cut, config.update, config.slots))
        return config.replace(resident=found.space.placed(roomiest.resident or 0, roomiest.split))

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
            if self.room_bytes(other) >= 0 and self.fits(other):
                return other
        return chosen


def _sizes(config: TrainConfig) -> Sizes:
    return Sizes(
        batch=config.sides * config.per_device_train_batch_size,
        tokens=config.max_length,
        micro_batches=config.gradient_accumulation_steps,
    )
