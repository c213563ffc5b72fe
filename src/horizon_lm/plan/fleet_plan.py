"""A plan for several ranks: what only a fleet has to say of it, and the smallest fleet that would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from horizon_lm.config import TrainConfig
from horizon_lm.engine.homes import resident_order
from horizon_lm.errors import ConfigError
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.fleet import Fleet
from horizon_lm.plan.predict import Prediction
from horizon_lm.schedule import Op
from horizon_lm.words import count

_MOST_NODES = 4096  # of `smallest`
PlannerOf = Callable[[Fleet], Planner]


class BreakEven(NamedTuple):
    """Tokens from which on the forward pass takes as long as what runs beside it: a step's of all ranks for
    the update on the host, a round's of each rank for gathering and for uploading weights."""

    update: int
    network: int
    upload: int


def break_even(costs: Costs) -> BreakEven:
    """By the costs of a step's ops, whatever its size."""
    plan, outline = costs.plan, costs.outline
    units = resident_order(outline)
    tokens = costs.measures.batch * costs.measures.tokens
    forward = [Op("F", unit, policy=plan.policy(unit)) for unit in range(1, plan.head)]
    each = sum(costs.seconds(op) for op in forward) / tokens
    streamed = [unit for unit in units if unit in plan.uploaded]

    def of(kind: str, of_units: list[int]) -> int:
        return round(sum(costs.seconds(Op(kind, unit)) for unit in of_units) / each)

    updated = [unit for unit in units if unit in plan.trainable - plan.resident]
    return BreakEven(plan.world * of("O", updated), of("J", units), of("U", streamed))


@dataclass(frozen=True)
class FleetPlan:
    """asked, chosen: settings before and after the planner of the fleet chose. planner_of: those of fleets of
    the same hardware."""

    asked: TrainConfig
    chosen: TrainConfig
    planner_of: PlannerOf
    fleet: Fleet

    @property
    def _planner(self) -> Planner:
        return self.planner_of(self.fleet)

    @property
    def prediction(self) -> Prediction:
        return self._planner.predict(self.chosen)

    @cached_property
    def smallest(self) -> Fleet | None:
        """The smallest fleet that trains the model by these settings; None if none was found."""
        return smallest(self.asked, self.planner_of, self.fleet.gpus_per_node)

    @cached_property
    def in_memory(self) -> Fleet | None:
        """The smallest with all units in device memory."""
        if self._planner.limits.device is None:
            return None
        everything = len(resident_order(self._planner.outline))
        asked = self.asked.replace(resident=everything)
        return smallest(asked, self.planner_of, self.fleet.gpus_per_node)

    @property
    def seconds_by_reduction(self) -> tuple[float, float]:
        """Of a step: gradients added exactly, and fast; all else as planned."""
        return self._planner.seconds_by_reduction(self.chosen)

    @property
    def node_bytes(self) -> int:
        """Host bytes of a node."""
        return self.prediction.host_bytes * self.fleet.gpus_per_node

    @property
    def rate_of_each(self) -> float:
        """Tokens per second and rank."""
        return self.prediction.tokens_per_second / self.fleet.world

    @property
    def idle_share(self) -> float:
        """The share of the ranks' positions that have no micro-batch."""
        found = self.prediction
        return 1 - found.micro_batches / (self.fleet.world * found.plan.micro_batches)

    def notes(self) -> list[str]:
        found, even = self.prediction, break_even(self.prediction.costs)
        notes = []
        if self.idle_share:
            notes.append(
                f"{self.idle_share:.0%} of the ranks' time is idle: {count(self.fleet.world, 'rank')} share "
                f"{count(found.micro_batches, 'micro-batch', 'micro-batches')}; a multiple would use them"
            )
        if found.tokens < even.update and found.plan.update == "deferred":
            notes.append(
                f"the forward pass hides the update from {count(even.update, 'token')} a step on, on any "
                "number of nodes; with fewer tokens, fewer GPUs of each are nearly as fast"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = self.prediction
        even = break_even(found.costs)
        exact, fast = self.seconds_by_reduction
        return {
            "nodes": self.fleet.nodes,
            "gpus_per_node": self.fleet.gpus_per_node,
            "micro_batches_per_rank": found.plan.micro_batches,
            "host_bytes_per_node": self.node_bytes,
            "tokens_per_second_per_gpu": self.rate_of_each,
            "reduction": {"chosen": found.plan.reduction, "exact_seconds": exact, "fast_seconds": fast},
            "break_even": {
                "update_tokens_per_step": even.update,
                "network_tokens_per_gpu": even.network,
                "upload_tokens_per_gpu": even.upload,
            },
        }

    def sizes(self) -> dict[str, Any]:
        """The smallest fleets, for JSON."""
        return {
            "smallest_fleet": _values(self.smallest),
            "smallest_fleet_in_device_memory": _values(self.in_memory),
        }


def _values(fleet: Fleet | None) -> dict[str, int] | None:
    return None if fleet is None else {"nodes": fleet.nodes, "gpus_per_node": fleet.gpus_per_node}


def smallest(config: TrainConfig, planner_of: PlannerOf, gpus_per_node: int) -> Fleet | None:
    """Find the smallest fleet on which the run fits: the fewest GPUs of one node, or else the fewest nodes
    with `gpus_per_node` each. None if not even thousands of nodes do."""

    def fits(fleet: Fleet) -> bool:
        try:
            return planner_of(fleet).has_room(config)
        except ConfigError:  # `rounds` does not divide the micro-batches of each of its ranks
            return False

    for gpus in range(1, gpus_per_node + 1):
        if fits(Fleet(1, gpus)):
            return Fleet(1, gpus)
    low, high = 1, 2
    while not fits(Fleet(high, gpus_per_node)):
        low, high = high, 2 * high
        if high > _MOST_NODES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(Fleet(middle, gpus_per_node)) else (middle, high)
    return Fleet(high, gpus_per_node)
