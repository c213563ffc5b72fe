"""Simulation of steps, in little time if they have many micro-batches.

A long step is simulated as a short one: of three rounds, the second of which stands for each further one, and
with few micro-batches per round, each of which stands for several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from horizon_lm.plan.costs import Costs
from horizon_lm.schedule import Buffer, Lane, Op, Simulation, StepSpec, build, derive_waits, simulate
from horizon_lm.schedule.draw import Span, busy_seconds
from horizon_lm.schedule.step_spec import EXACT

_FEW_ROUNDS = 3
_OF_EACH_MICRO_BATCH = frozenset("FBCLEXR")
_OF_EACH_IF_EXACT = _OF_EACH_MICRO_BATCH | frozenset("TV")  # `StepSpec.reduction`


@dataclass(frozen=True)
class SimulatedStep:
    """simulation: of the step, or of the short one in its place. seconds, busy (by lane): of the step."""

    simulation: Simulation
    seconds: float
    busy: dict[str, float]
    is_exact: bool = True


def visits(spec: StepSpec) -> int:
    """Micro-batches times layers: what the time of a simulation grows with."""
    return spec.micro_batches * spec.layers


def simulate_step(costs: Costs, spec: StepSpec, most_visits: int) -> SimulatedStep:
    """Simulate the ops of `spec`, or of a short step if it has more than `most_visits`."""
    if visits(spec) <= most_visits or spec.evaluate:
        return _exact(simulate_ops(costs, spec))
    rounds = min(spec.rounds, _FEW_ROUNDS)
    each = max(2, most_visits // (rounds * spec.layers))
    size = min(spec.round_size, each)
    several = spec.round_size / size
    if rounds == spec.rounds or spec.micro_batches % spec.rounds:
        short = replace(spec, micro_batches=size * spec.rounds)
        return replace(_exact(simulate_ops(costs, short, several)), is_exact=False)
    few = _exact(simulate_ops(costs, replace(spec, rounds=rounds, micro_batches=rounds * size), several))
    more = spec.rounds - rounds
    begins = [m * size for m in range(rounds)]
    each_round, of_lanes = _of_a_round(few.simulation.spans, begins)
    busy = {lane: t + more * of_lanes.get(lane, 0.0) for lane, t in few.busy.items()}
    return SimulatedStep(few.simulation, few.seconds + more * each_round, busy, is_exact=False)


def _of_a_round(spans: Sequence[Span], begins: Sequence[int]) -> tuple[float, dict[str, float]]:
    """(seconds, busy seconds by lane) of a round between others: the last but one. begins: the first
    micro-batch of each round."""
    firsts = {(0, m) for m in begins}
    starts = [
        i for i, (op, _, _) in enumerate(spans) if op.kind == "F" and (op.unit, op.micro_batch) in firsts
    ]
    ends = [max(end for op, _, end in spans[:i] if op.lane is Lane.COMPUTE) for i in starts[-2:]]
    return ends[1] - ends[0], busy_seconds(spans[starts[-2] : starts[-1]])


def _exact(simulation: Simulation) -> SimulatedStep:
    return SimulatedStep(simulation, simulation.seconds, busy_seconds(simulation.spans))


def simulate_ops(costs: Costs, spec: StepSpec, several: float = 1.0) -> Simulation:
    """Simulate the ops of `spec`, each of whose micro-batches stands for `several`.

    A pass before each step completes the updates, so that they overlap with nothing: spec says sync then, and
    costs what the engine does.
    """
    # Ops that run one at a time wait for nothing but the op before.
    ops, waits = (ops_of(spec), None) if costs.is_cpu else schedule_of(spec)
    alone = spec.at_turnaround if spec.joins_turnaround else frozenset()
    of_each = _OF_EACH_IF_EXACT if spec.reduction == EXACT else _OF_EACH_MICRO_BATCH

    def seconds(op: Op) -> float:
        return costs.seconds(op) * several if op.kind in of_each else costs.seconds(op)

    def num_bytes(buffer: Buffer, op: Op) -> tuple[str, int] | None:
        found = costs.num_bytes(buffer, op)
        is_one = buffer.micro_batch < 0 or buffer.region == "graph" and buffer.index in alone
        return found if found is None or is_one else (found[0], int(found[1] * several))

    return simulate(
        ops,
        costs.seconds if several == 1 else seconds,
        num_bytes=costs.num_bytes if several == 1 else num_bytes,
        working_bytes=costs.working_bytes,
        waits=waits,
        one_at_a_time=costs.is_cpu,
    )


@lru_cache(maxsize=8)
def schedule_of(plan: StepSpec) -> tuple[Sequence[Op], Sequence[tuple[int, ...]]]:
    """Ops and waits of a step that begins with deferred updates of the step before, as most do."""
    ops = ops_of(plan)
    return ops, derive_waits(ops)


@lru_cache(maxsize=8)
def ops_of(plan: StepSpec) -> Sequence[Op]:
    """The ops of `schedule_of` alone."""
    pends = plan.update == "deferred" and not plan.evaluate
    return build(plan, step=0, pending=plan.trainable if pends else ())
