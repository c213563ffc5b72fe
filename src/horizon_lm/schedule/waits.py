"""Waits between lanes and last uses of buffers, derived from what ops read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from horizon_lm.schedule.ops import Buffer, Lane, Op

# Regions whose content lives within a step; the rest is persistent host memory.
TRANSIENT = frozenset(
    {
        "slot",
        "staging",
        "shard",
        "grad_slot",
        "grad_shard",
        "slab",
        "sum",
        "sum_slab",
        "rows",
        "call",
        "input",
        "graph",
        "boundary",
        "boundary_slot",
        "input_grad",
        "row_grads",
        "row_sums",
    }
)


def derive_waits(ops: Sequence[Op]) -> list[tuple[int, ...]]:
    """For each op, the ops of other lanes it must wait for (indices into `ops`).

    Two ops conflict if one writes what the other reads or writes. A conflict needs a wait unless program
    order within a lane and other waits imply it. Taking candidates latest first gives the smallest set:
    without any one of the waits a conflict is unordered (tests remove each, and `check` finds it).
    """
    past: list[int] = []  # past[i]: bit set of all ops that are known to end before op i starts
    last_in_lane: dict[Lane, int] = {}
    waits: list[tuple[int, ...]] = []
    conflicts = conflicting_before(ops)
    for i, op in enumerate(ops):
        known = 0
        before = last_in_lane.get(op.lane)
        if before is not None:
            known = past[before] | 1 << before
        needed = []
        for j in sorted(conflicts[i], reverse=True):
            if not known >> j & 1:
                needed.append(j)
                known |= past[j] | 1 << j
        past.append(known)
        last_in_lane[op.lane] = i
        waits.append(tuple(needed))
    return waits


def conflicting_before(ops: Sequence[Op]) -> list[set[int]]:
    """For each op, the earlier ops it conflicts with directly: the last writer of what it reads or writes,
    and the readers since then of what it writes."""
    writer: dict[Buffer, int] = {}
    readers: dict[Buffer, list[int]] = defaultdict(list)
    found: list[set[int]] = []
    for i, op in enumerate(ops):
        mine = {writer[buffer] for buffer in op.reads if buffer in writer}
        for buffer in op.writes:
            if buffer in writer:
                mine.add(writer[buffer])
            mine.update(readers[buffer])
        found.append(mine)
        for buffer in op.reads:
            readers[buffer].append(i)
        for buffer in op.writes:
            writer[buffer] = i
            readers[buffer] = []
    return found


def last_uses(ops: Sequence[Op]) -> list[tuple[Buffer, ...]]:
    """For each op, the transient buffers that nothing reads after it until they are overwritten.

    The last op in program order to touch a buffer waits for all earlier ones (they conflict, or share a
    lane), so nothing reads the buffer once that op has ended.
    """
    last: dict[Buffer, int] = {}
    ends: list[list[Buffer]] = [[] for _ in ops]
    for i, op in enumerate(ops):
        for buffer in op.writes - op.reads:
            if buffer in last:
                ends[last[buffer]].append(buffer)
        for buffer in op.reads | op.writes:
            if buffer.region in TRANSIENT:
                last[buffer] = i
    for buffer, i in last.items():
        ends[i].append(buffer)
    return [tuple(sorted(buffers)) for buffers in ends]
