"""Search for the fastest candidate that fits, by simulation.

Cuts of the step come in the order of their bounds (`plan.bounds`). For each, the number of resident units is
searched between what host memory requires and what device memory allows; what they leave of device memory
goes to the policies of layers, the most seconds per byte first. The best candidate is refined at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple, overload

from horizon_lm.config import TrainConfig
from horizon_lm.config.memory import ACTIVATIONS, per_layer
from horizon_lm.plan.bounds import Bounds, Upgrade, unit_bytes, upgrades
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.predict import Prediction
from horizon_lm.plan.space import Candidate, Cut, Space, listed
from horizon_lm.schedule.step_spec import ATTENTION, KEEP, PRODUCTS, RECOMPUTE

# A gain below this is not measurable: the choice that needs less memory or is simpler stays.
TIE = 0.002
MOST_VISITS = 300  # of a simulation during the search; a longer step is shortened (`plan.steps`)
_MOST_CUTS = 6  # that are searched; of a CPU as of a GPU
_EQUAL = 0.01  # bounds this close are equal, and the simpler cut comes first


class Machine(NamedTuple):
    """What the search asks of the planner. predict: quickly. rest: bytes left by memory; negative if
    short."""

    predict: Callable[[TrainConfig], Prediction]
    rest: Callable[[TrainConfig, Prediction], dict[str, int]]
    costs: Callable[[TrainConfig], Costs]
    device: int | None


class Found(NamedTuple):
    seconds: float
    candidate: Candidate


@dataclass
class Search:
    space: Space
    machine: Machine

    def best(self) -> Candidate | None:
        """The fastest candidate found; None if none fits."""
        update, slots = self.space.updates()[0], self.space.slots()[0]
        found: Found | None = None
        searched, too_large = 0, list[Cut]()
        for bound, residents, cut in self._cuts(update, slots):
            if searched >= _MOST_CUTS:
                break
            if found is not None and not self.space.is_cpu and bound > found.seconds * (1 - TIE):
                continue
            if any(_needs_more(cut, other) for other in too_large):
                continue
            limit = math.inf if found is None else found.seconds
            of_cut = self._of_cut(Candidate(cut, update, slots), residents, limit)
            if of_cut is None:
                too_large.append(cut)
                continue
            searched, found = searched + 1, _better(found, of_cut, 0.0 if self.space.is_cpu else TIE)
        return None if found is None else self._refined(found).candidate

    def least(self) -> Candidate:
        """The candidate that needs least memory, as far as host and device can share it."""
        space = self.space
        cut = min(space.cuts(), key=lambda cut: (cut.batch, cut.rounds > 1, cut.sums == "device"))
        candidate = Candidate(cut, space.updates()[0], space.slots()[0], spilled=space.spilled()[-1])
        return self.roomiest(candidate)

    def has_room(self) -> bool:
        """Whether a cut with the smallest micro-batches fits, recomputing all layers: in one round, or in as
        many as can be."""
        cuts = self.space.cuts()
        small = [cut for cut in cuts if cut.batch == min(cut.batch for cut in cuts)]
        ends = {min(small, key=lambda cut: cut.rounds)}
        for sums in {cut.sums for cut in small}:
            ends.add(max((cut for cut in small if cut.sums == sums), key=lambda cut: cut.rounds))
        update, slots = self.space.updates()[0], self.space.slots()[0]
        return any(
            self._has_room(candidate)
            for cut in sorted(ends, key=lambda cut: (cut.rounds, cut.sums))
            for candidate in self._placed(Candidate(cut, update, slots))
        )

    def _placed(self, candidate: Candidate) -> list[Candidate]:
        """The candidate with trainable parts where they may live."""
        return [replace(candidate, split=split) for split in self.space.splits()]

    def _has_room(self, candidate: Candidate) -> bool:
        """Whether a candidate fits with some number of spilled inputs; the others stay on the device."""
        least, most = self.space.spilled()[0], self.space.spilled()[-1]

        def rest(fewer: int) -> dict[str, int]:
            return self._rest_of(self.pooled(replace(candidate, spilled=most - fewer)))

        if min(rest(0).values()) >= 0:
            return True
        if most == least or rest(0).get("device", 0) < 0:
            return False
        fewer = _last(lambda number: rest(number).get("device", 0), most - least)
        return fewer > 0 and min(rest(fewer).values()) >= 0

    def roomiest(self, candidate: Candidate) -> Candidate:
        """With residents that leave most room, trainable parts among them or not."""
        found = [self.pooled(placed) for placed in self._placed(candidate)]
        return found[0] if len(found) == 1 else max(found, key=self._room)

    def pooled(self, candidate: Candidate) -> Candidate:
        """With as few residents as host memory allows; with as many as the device holds if it does not."""
        low, high = self._range(replace(candidate, resident=self.space.residents()[0]))
        return replace(candidate, resident=low if low is None else max(0, min(low, high)))

    # Cuts.

    def _cuts(self, update: str, slots: int) -> Iterable[tuple[float, int, Cut]]:
        """(lower bound of the seconds, residents of that bound, cut), the most promising first."""
        rows = []
        for cut in self.space.cuts():
            if self.space.is_cpu:
                made = self.space.make(Candidate(cut, update, slots, 0))
                rows.append((self._seconds(made), 0, cut))
                continue
            placed = self._placed(Candidate(cut, update, slots, 0))
            bounds = min(map(self._bounds, placed), key=lambda bounds: min(bounds.values()))
            residents = min(bounds, key=bounds.__getitem__)
            rows.append((bounds[residents], residents, cut))
        if self.space.is_cpu:
            return sorted(rows, key=lambda row: row[0])
        rows.sort(
            key=lambda row: (
                math.floor(math.log(max(row[0], 1e-12)) / _EQUAL),
                row[2].rounds,
                row[2].micro_batches,
                row[0],
            ),
        )
        # Bounds take a little memory for none: where it is short, the cut that needs least may be the best.
        least = min(range(len(rows)), key=lambda n: (rows[n][2].batch, rows[n][2].rounds))
        rows.insert(min(least, _MOST_CUTS - 1), rows.pop(least))
        return rows

    def _bounds(self, candidate: Candidate) -> dict[int, float]:
        """Lower bounds of the seconds of a cut, by the number of residents."""
        key = candidate.cut, candidate.split
        if key not in self._known_bounds:
            space, costs = self.space, self.machine.costs(self.space.make(replace(candidate, resident=0)))
            steps, can_spill = self._upgrades(candidate), len(space.spilled()) > 1
            residents, order = space.residents(), space.order()
            found = Bounds(costs, candidate.cut, steps, residents, order, can_spill, self.machine.device)
            self._known_bounds[key] = found.by_residents()
        return self._known_bounds[key]

    @cached_property
    def _known_bounds(self) -> dict[tuple[Cut, bool], dict[int, float]]:
        return {}

    def _upgrades(self, candidate: Candidate) -> list[Upgrade]:
        """Upgrades of a cut's layers. On a CPU those that gain nothing by the profile are made as well."""
        if self.space.is_cpu:
            return [Upgrade("", policy, 1.0, 1) for policy in self.space.policies()]
        key = candidate.cut.batch
        if key not in self._known_upgrades:
            costs = self.machine.costs(self.space.make(candidate))
            self._known_upgrades[key] = upgrades(costs, self.space.policies())
        return self._known_upgrades[key]

    @cached_property
    def _known_upgrades(self) -> dict[int, list[Upgrade]]:
        return {}

    # One cut.

    def _of_cut(self, candidate: Candidate, guess: int, limit: float) -> Found | None:
        """The fastest candidate found for a cut; None if none fits. limit: seconds to beat."""
        found: Found | None = None
        spills = sorted({self.space.spilled()[0], self.space.spilled()[-1]})
        for placed, spilled in product(self._placed(candidate), spills):
            if found is not None and (found.candidate.split > placed.split or self._is_full(found.candidate)):
                break  # small parts live on the device if they fit; or no room for activations is needed
            start = replace(placed, spilled=spilled, resident=self.space.residents()[0])
            found = _better(found, self._with_residents(start, guess, limit), TIE)
            limit = limit if found is None else min(limit, found.seconds)
        return found

    def _is_full(self, candidate: Candidate) -> bool:
        """Whether every layer has the last of the upgrades."""
        steps = self._upgrades(candidate)
        return not steps or getattr(candidate, steps[-1].policy) == self.space.layers

    def _with_residents(self, candidate: Candidate, guess: int, limit: float) -> Found | None:
        low, high = self._range(candidate)
        if low is None:
            return self._filled(candidate)
        if low > high:
            return None
        tried: dict[int, Found | None] = {}
        bounds = {} if self.space.is_cpu else self._bounds(candidate)

        def seconds(row: Found | None) -> float:
            return math.inf if row is None else row.seconds

        def of(number: int) -> float:
            if number not in tried:
                beaten = min([limit, *(seconds(row) for row in tried.values())]) * (1 - TIE)
                if tried and bounds.get(number, 0.0) > beaten:
                    return math.inf
                tried[number] = self._filled(replace(candidate, resident=number))
            return seconds(tried[number])

        for number in dict.fromkeys([low, min(max(low, guess), high), high]):
            of(number)
        step = max(1, (high - low) // 8)
        while step >= 1:
            best = min(tried, key=of)
            nearby = [n for n in (best - step, best + step) if low <= n <= high]
            if all(of(n) >= of(best) for n in nearby):
                step //= 2
        found: Found | None = None
        for number in sorted(tried):  # fewer residents are simpler
            found = _better(found, tried[number], TIE)
        return found

    def _range(self, candidate: Candidate) -> tuple[int | None, int]:
        """Numbers of residents: the fewest with which host memory is enough, and the most that the device
        holds, recomputing all layers. None: they are not open."""
        if self.space.residents() == [None]:
            return None, 0
        if self.space.is_cpu:
            return 0, 0
        config = self.space.make(candidate)
        prediction = self.machine.predict(config)
        rest = self.machine.rest(config, prediction)
        sizes = self._resident_sizes(config)
        most = len(sizes) - 1
        low = next((n for n in range(most + 1) if rest["host"] + sizes[n] >= 0), most + 1)
        high = max((n for n in range(most + 1) if rest.get("device", 0) - sizes[n] >= 0), default=-1)
        while 0 < low <= most and low < most and self._rest(candidate, low)["host"] < 0:
            low += 1  # slabs of eager updates stay as large until no unit of their size streams
        while high + 1 <= most and self._rest(candidate, high + 1).get("device", 0) >= 0:
            high += 1  # slots shrink with the units that stream
        return low, high

    def _rest(self, candidate: Candidate, residents: int) -> dict[str, int]:
        return self._rest_of(replace(candidate, resident=residents))

    def _rest_of(self, candidate: Candidate) -> dict[str, int]:
        """Bytes left of each memory."""
        config = self.space.make(candidate)
        return self.machine.rest(config, self.machine.predict(config))

    def _resident_sizes(self, config: TrainConfig) -> list[int]:
        """Bytes of the first N residents."""
        costs, found = self.machine.costs(config), [0]
        for unit in self.space.order():
            found.append(found[-1] + unit_bytes(costs, unit))
        return found

    # Policies.

    def _filled(self, candidate: Candidate) -> Found | None:
        """With as many upgraded layers as fit; None if not even recomputing all layers does."""
        steps = self._upgrades(candidate)

        def at(level: int) -> Candidate:
            return self._with_level(candidate, level, steps)

        if not self._fits(candidate):
            return None
        guess = None if self.space.is_cpu else self._guessed_level(candidate, steps)
        level = _last(lambda n: self._room(at(n)), self.space.layers * len(steps), guess)
        return self._found(self._least_spilled(at(level)))

    def _with_level(self, candidate: Candidate, level: int, steps: list[Upgrade]) -> Candidate:
        """The candidate after `level` upgrades of single layers, from the last layer down, one policy after
        the other."""
        layers = self.space.layers
        if not level:
            return candidate
        number, some = divmod(level - 1, layers)
        some += 1
        counts = {steps[number].policy: some}
        if number:
            counts[steps[number - 1].policy] = layers - some
        kept = counts.get(KEEP, 0)  # which spill nothing
        return replace(candidate, spilled=min(candidate.spilled, layers - kept)).with_kept(counts)

    def _guessed_level(self, candidate: Candidate, steps: list[Upgrade]) -> int:
        """The last level that should fit, by what the device has left without upgrades."""
        config = self.space.make(candidate)
        left = self.machine.rest(config, self.machine.predict(config)).get("device", 0)
        size, level = self.machine.costs(config).plan.round_size, 0
        for step in steps:
            count = min(self.space.layers, int(left / max(1, step.bytes * size)))
            level, left = level + count, left - count * step.bytes * size
            if count < self.space.layers:
                break
        return level

    def _least_spilled(self, candidate: Candidate) -> Candidate:
        most = candidate.spilled
        fewer = most - self.space.spilled()[0]
        saved = _last(lambda n: self._room(replace(candidate, spilled=most - n)), fewer, guess=fewer)
        return replace(candidate, spilled=most - saved)

    def with_more(self, chosen: TrainConfig) -> tuple[str, TrainConfig] | None:
        """(policy, the choice with one more layer under it): the upgrade that comes next, if there is one."""
        batch, count = chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps
        cut = Cut(batch, count, world=self.space.world)
        steps = self._upgrades(Candidate(cut, chosen.update, chosen.slots))
        words, layers = (RECOMPUTE, ATTENTION, PRODUCTS, KEEP), self.space.layers
        word = RECOMPUTE if chosen.activations == "auto" else str(chosen.activations)
        counts = Counter(per_layer(chosen.activations, ACTIVATIONS) or [word] * layers)
        for number, step in enumerate(steps):
            if sum(counts[later.policy] for later in steps[number:]) < layers:
                counts.update({step.lesser or RECOMPUTE: -1, step.policy: 1})
                made = listed(words, tuple(counts[word] for word in words))
                return step.policy, chosen.replace(activations=made)
        return None

    # The end.

    def smaller(self, candidate: Candidate) -> Candidate | None:
        """With one upgrade or, without any, one resident fewer; None if there is neither."""
        for policy in (*self.space.policies()[:1], *self.space.policies()[1:]):
            if getattr(candidate, policy):
                return replace(candidate, **{policy: getattr(candidate, policy) - 1})
        return replace(candidate, resident=candidate.resident - 1) if candidate.resident else None

    def _refined(self, found: Found) -> Found:
        """Try other update modes and one more slot, for which upgrades may give way."""
        for update in self.space.updates():
            for slots in self.space.slots():
                other = replace(found.candidate, update=update, slots=slots)
                if other == found.candidate:
                    continue
                if self._fits(other):
                    found = _better(found, self._found(other), TIE)
                elif not self.space.is_cpu and self.space.chooses_policies:
                    found = _better(found, self._filled(other.with_kept({})), TIE)
        return found

    def _found(self, candidate: Candidate) -> Found:
        return Found(self._seconds(self.space.make(candidate)), candidate)

    def _fits(self, candidate: Candidate) -> bool:
        return self._room(candidate) >= 0

    def _room(self, candidate: Candidate) -> int:
        """Bytes left of the memory that has least left; negative if the candidate does not fit."""
        return min(self._rest_of(candidate).values())

    def _seconds(self, config: TrainConfig) -> float:
        return self.machine.predict(config).seconds


def _needs_more(cut: Cut, other: Cut) -> bool:
    """Whether a cut needs the memory that another does, or more."""
    sizes = (cut.batch, other.batch), (cut.round_size, other.round_size)
    return all(mine >= its for mine, its in sizes) and other.sums in ("", cut.sums)


@overload
def _better(found: Found, other: Found | None, tie: float) -> Found: ...
@overload
def _better(found: Found | None, other: Found | None, tie: float) -> Found | None: ...
def _better(found: Found | None, other: Found | None, tie: float) -> Found | None:
    """The other if it is faster by more than a tie."""
    if found is None or other is None:
        return found or other
    return other if other.seconds < found.seconds * (1 - tie) else found


def _last(room: Callable[[int], int], most: int, guess: int | None = None) -> int:
    """Find the largest number up to `most` that fits, as every smaller one does; 0 is known to.

    room: bytes that a number leaves, negative if it does not fit. It falls nearly linearly, so the next
    number to try is the zero of the line through the last two, and every third time half-way.
    """
    low, high, looks = 0, most + 1, 0
    last, number = (0, room(0)), (most + 1) // 2 if guess is None else guess
    while high - low > 1:
        number = min(max(number, low + 1), high - 1)
        before, last = last, (number, room(number))
        low, high = (number, high) if last[1] >= 0 else (low, number)
        looks += 1
        each = (before[1] - last[1]) / (last[0] - before[0])
        is_line = each > 0 and looks % 3
        number = math.floor(last[0] + last[1] / each) if is_line else (low + high) // 2
    return low
