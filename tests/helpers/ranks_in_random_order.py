"""Schedules of several ranks, run together: each rank's ready ops in random order, and collectives once all
ranks are at the same one."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from horizon_lm.schedule import Buffer, Lane, Op, StepSpec
from horizon_lm.schedule.world import is_collective
from schedule_authorities import Waits
from symbolic_steps import Symbols, meet, references

Ends = Sequence[Sequence[Buffer]]


class Stuck(Exception):
    """No rank can go on."""


def random_order_of_ranks(
    lists: Sequence[Sequence[Op]], waits: Sequence[Waits], rng: random.Random
) -> Iterator[list[tuple[int, int]]]:
    """Yield what runs next: the rank and index of an op, or those of a collective on all ranks. Raises
    `Stuck` when nothing can run, or ranks meet at different collectives."""
    queues: list[dict[Lane, deque[int]]] = [defaultdict(deque) for _ in lists]
    for rank, ops in enumerate(lists):
        for i, op in enumerate(ops):
            queues[rank][op.lane].append(i)
    done: list[set[int]] = [set() for _ in lists]
    left = sum(map(len, lists))
    while left:
        ready: list[list[tuple[int, int]]] = []
        waiting: dict[Lane, list[tuple[int, int]]] = defaultdict(list)
        for rank, ops in enumerate(lists):
            for lane, queue in queues[rank].items():
                if queue and done[rank].issuperset(waits[rank][queue[0]]):
                    place = (rank, queue[0])
                    if is_collective(ops[queue[0]]):
                        waiting[lane].append(place)
                    else:
                        ready.append([place])
        ready += [places for places in waiting.values() if len(places) == len(lists)]
        if not ready:
            raise Stuck(f"{left} ops are left")
        places = rng.choice(ready)
        found = {(str(lists[rank][i]), lists[rank][i].step) for rank, i in places}
        if len(found) > 1:
            raise Stuck(f"ranks meet at {sorted(found)}")
        for rank, i in places:
            queues[rank][lists[rank][i].lane].popleft()
            done[rank].add(i)
        left -= len(places)
        yield places


def run_ranks(
    spec: StepSpec, lists: Sequence[Sequence[Op]], waits: Sequence[Waits], ends: Ends, rng: random.Random
) -> bool:
    """Run two steps of all ranks in a random order, on expressions; released buffers are poisoned. Return
    whether each rank has the losses and weights of a plain nested loop over all ranks."""
    first = Symbols(spec, mark=(0,))
    ranks = [first]
    ranks += [Symbols(spec, names=first.names, alone=first.alone, mark=(r,)) for r in range(1, len(lists))]
    for places in random_order_of_ranks(lists, waits, rng):
        ops = [lists[rank][i] for rank, i in places]
        if is_collective(ops[0]):
            meet(ranks, ops)
        else:
            ranks[places[0][0]].run(ops[0])
        for rank, i in places:
            for buffer in ends[i]:
                ranks[rank].release(buffer)
    return [rank.outcome() for rank in ranks] == references(spec, ranks)
