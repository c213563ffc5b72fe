"""Lower bounds of the time of a step, in closed form: which cuts of a step are worth simulating.

The lanes are taken to overlap perfectly, and memory to hold nothing but what it must. The search simulates
cuts in the order of their bounds, and leaves out those whose bound exceeds the time of the best found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from horizon_lm.plan.costs import Costs, work_seconds
from horizon_lm.plan.space import Cut
from horizon_lm.schedule.ops import Op
from horizon_lm.schedule.step_spec import KEEP, RECOMPUTE


class Upgrade(NamedTuple):
    """A policy in place of a lesser one, for a layer: seconds saved and bytes taken, for a micro-batch."""

    lesser: str
    policy: str
    seconds: float
    bytes: int

    @property
    def rate(self) -> float:
        return self.seconds / max(1, self.bytes)


def upgrades(costs: Costs, policies: Sequence[str]) -> list[Upgrade]:
    """List the upgrades worth making, the most seconds per byte first: the upper hull of all policies, each
    of the average layer."""
    points = [(policy, *_figures(costs, policy)) for policy in (RECOMPUTE, *policies)]
    found: list[Upgrade] = []
    at = 0
    while True:
        name, taken, saved = points[at]
        options = [
            (Upgrade(name, other, better - saved, int(more - taken)), i)
            for i, (other, more, better) in enumerate(points)
            if better > saved
        ]
        if not options:
            return found
        best, at = max(options, key=lambda option: (option[0].rate, option[0].seconds))
        found.append(best)


def _figures(costs: Costs, policy: str) -> tuple[float, float]:
    """(bytes held, seconds saved compared with recompute) of the average layer and one micro-batch."""
    kinds, profile = Counter(costs.outline.kind_of), costs.profile
    held = saved = 0.0
    for kind, count in kinds.items():
        layer = costs.measures.layers[kind]
        plain, other = layer.under(RECOMPUTE), layer.under(policy)
        times = [work_seconds(p.forward.work + p.backward.work, profile) for p in (plain, other)]
        held += count * other.held
        saved += count * (times[0] - times[1])
    return held / len(costs.outline.kind_of), saved / len(costs.outline.kind_of)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the steps of one cut. costs: those of its ops, recomputing all layers, without residents but
    those that the configuration names, and trainable parts.

    order: units that may become resident as a whole, in this order. device: bytes that may be taken; None for
    a CPU.
    """

    costs: Costs
    cut: Cut
    upgrades: Sequence[Upgrade]
    residents: Sequence[int | None]
    order: Sequence[int]
    can_spill: bool
    device: int | None

    def by_residents(self) -> dict[int, float]:
        """Seconds by the number of residents, up to the most that may fit."""
        found: dict[int, float] = {}
        for asked in self.residents:
            number = len(self._named) if asked is None else asked
            left = self._device_left(number)
            if left < 0 and asked:
                break
            found[number] = self._seconds(number, max(0, left))
        return found

    def _device_left(self, residents: int) -> int:
        if self.device is None:
            return 1 << 60
        plan = self.costs.plan
        fixed = sum(self.costs.fixed_bytes().values()) + int(self.costs.profile.context_bytes)
        with_backward = range(max(1, plan.lowest_backward), plan.head)
        stored = 0 if self.can_spill else plan.round_size * len(with_backward) * self.costs.boundary
        more = self._resident_bytes[residents] - self._resident_bytes[len(self._named)]
        return self.device - fixed - stored - more

    @cached_property
    def _named(self) -> frozenset[int]:
        """Units that the configuration makes resident as a whole."""
        return self.costs.plan.resident - self.costs.plan.split

    @cached_property
    def _order(self) -> list[int]:
        """All units that a step reads: those that the configuration names, then others in the order in which
        they become resident, then those that never do."""
        plan = self.costs.plan
        rest = (unit for unit in self.order if unit not in self._named)
        return list(dict.fromkeys([*sorted(self._named), *rest, *sorted(plan.uploaded)]))

    def _sums(self, values: Sequence[float]) -> list[float]:
        return list(accumulate(values, initial=0.0))

    @cached_property
    def _resident_bytes(self) -> list[int]:
        return [int(n) for n in self._sums([unit_bytes(self.costs, u) for u in self._order])]

    @cached_property
    def _moved(self) -> dict[str, list[float]]:
        """Seconds by kind of op that residents save (or, for A, take), by their number."""
        costs, split = self.costs, self.costs.plan.split

        def sums(kind: str, times: Callable[[int], int]) -> list[float]:
            return self._sums([costs.seconds(Op(kind, u)) * times(u) for u in self._order])

        found = {kind: sums(kind, lambda u: u not in split) for kind in "OA"}
        return found | {"D": sums("D", lambda u: 1), "U": sums("U", self._uploads)}

    @cached_property
    def _of_parts(self) -> float:
        """Seconds on the compute lane, whatever is resident: updates of parts that live on the device, and
        unpacking."""
        costs, plan = self.costs, self.costs.plan
        updates = sum(costs.seconds(Op("A", u)) for u in plan.split & plan.trainable)
        return updates + sum(costs.seconds(Op("Q", u)) * self._uploads(u) for u in plan.packed)

    def _uploads(self, unit: int) -> int:
        """Least number of uploads of a unit in a step."""
        plan = self.costs.plan
        return plan.rounds if unit in range(1, plan.head) else 1

    @cached_property
    def _compute(self) -> tuple[float, float]:
        """Seconds of the forward and of the backward passes, recomputing all layers but those at the
        turnaround, which are computed once."""
        costs, count = self.costs, self.cut.positions
        ends, profile = costs.measures.ends, costs.profile
        seconds = {
            (kind, policy): (work_seconds(p.forward.work, profile), work_seconds(p.backward.work, profile))
            for kind, layer in enumerate(costs.measures.layers)
            for policy in (RECOMPUTE, KEEP)
            for p in [layer.under(policy)]
        }
        forward, backward = (
            work_seconds(ends.forward.work, profile),
            work_seconds(ends.backward.work, profile),
        )
        backward += work_seconds(ends.loss.work, profile)
        for unit, kind in enumerate(costs.outline.kind_of, 1):
            policy = KEEP if unit in costs.plan.at_turnaround else RECOMPUTE
            forward += seconds[kind, policy][0]
            backward += seconds[kind, policy][1] * (unit >= costs.plan.lowest_backward)
        return count * forward, count * backward

    def _saved(self, left: int) -> float:
        """Seconds of recomputation that `left` bytes of device memory save in a step."""
        layers, saved = self.costs.plan.layers, 0.0
        for upgrade in self.upgrades:
            each = max(1, upgrade.bytes) * self.costs.plan.round_size
            count = min(float(layers), left / each)
            saved += count * upgrade.seconds * self.cut.positions
            left -= int(count * each)
            if count < layers:
                break
        return saved

    @cached_property
    def _network(self) -> float:
        """Seconds of J and T in a step, of all units."""
        costs, plan = self.costs, self.costs.plan
        if not plan.is_shared:
            return 0.0
        joins = sum(costs.seconds(Op("J", unit)) * self._uploads(unit) for unit in self._order)
        positions = range(plan.micro_batches)
        totals = (
            costs.seconds(Op("T", unit)) * sum(plan.totals(unit, m) for m in positions)
            for unit in plan.trainable
        )
        return joins + sum(totals)

    @cached_property
    def _sum_seconds(self) -> dict[str, float]:
        """Seconds of P, G and S in a step."""
        costs, plan = self.costs, self.costs.plan
        counts = {"P": plan.rounds - 1, "G": plan.rounds - 1, "S": 0}
        if plan.adds_on_host:
            counts |= {"G": 1, "S": plan.rounds - 1}
        slab, units = 0 if plan.adds_on_host else -1, plan.host_sums
        return {
            kind: count * sum(costs.seconds(Op(kind, u, sum_slab=-1 if kind == "G" else slab)) for u in units)
            for kind, count in counts.items()
        }

    def _seconds(self, residents: int, left: int) -> float:
        plan = self.costs.plan
        moved = {kind: (sums[residents], sums[-1]) for kind, sums in self._moved.items()}
        streamed = {kind: whole - some for kind, (some, whole) in moved.items()}
        forward, backward = self._compute
        saved, apply, sums = self._saved(left), moved["A"][0] + self._of_parts, self._sum_seconds
        compute, update = forward + backward - saved + apply, streamed["O"] + sums["S"]
        lanes = [compute, update, streamed["U"] + sums["G"], streamed["D"] + sums["P"]]
        if self.costs.is_cpu:
            return sum(lanes) + self._network
        if plan.update == "sync":
            return max([*lanes[2:], self._network, compute + streamed["O"]])
        # Updates overlap with the forward pass of the first round, or with the backward pass of the last.
        overlapping = forward if plan.update == "deferred" else backward - saved
        lanes.append(self._network)
        return max(*lanes, streamed["O"] + compute - apply - overlapping / plan.rounds)


def unit_bytes(costs: Costs, unit: int) -> int:
    """Bytes that a rank's share of a unit takes where it lives: weights, optimizer state and stored gradient;
    of a split unit its frozen part."""
    share, spec = costs.shards[unit], costs.spec
    if unit in spec.split:
        return (share.layout.wide_offset - share.layout.packed_numel) * spec.dtype.itemsize
    state = share.weights_numel * spec.dtype.itemsize
    if spec.dtype.itemsize == 2:
        state += 2 * share.residual_numel
    moments = (1 + spec.second_moment) * spec.moment_dtype.itemsize
    return state + share.trainable_share * (moments + (0 if spec.slabs else spec.dtype.itemsize))
