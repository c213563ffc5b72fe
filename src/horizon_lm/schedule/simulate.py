"""A schedule on a machine that need not be there: when each op starts and ends, and the peak of each memory.

The rules are those of the lanes that execute it: an op starts when the op before it on its lane and
all ops that it waits for have ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .ops import Buffer, Lane, Op
from .waits import derive_waits, last_uses

Span = tuple[Op, float, float]


@dataclass(frozen=True)
class Simulation:
    """spans: (op, start, end) in seconds, in program order. peaks: bytes by memory."""

    spans: list[Span]
    peaks: dict[str, int]

    @property
    def seconds(self) -> float:
        return max((end for _, _, end in self.spans), default=0.0)

    def busy_seconds(self, lane: Lane) -> float:
        return sum(end - start for op, start, end in self.spans if op.lane is lane)


def simulate(
    ops: Sequence[Op],
    seconds: Callable[[Op], float],
    *,
    num_bytes: Callable[[Buffer, Op], tuple[str, int] | None] | None = None,
    waits: Sequence[tuple[int, ...]] | None = None,
) -> Simulation:
    """Run `ops` (program order) with the given cost of each.

    seconds: how long an op takes on its lane. num_bytes: for a transient buffer and the op that
    writes it first, the memory that holds it and its bytes, or None where that memory exists
    anyway (slots). waits: derived when not given. Raises ValueError for a negative cost.
    """
    waits = derive_waits(ops) if waits is None else waits
    ends: list[float] = []
    free: dict[Lane, float] = defaultdict(float)
    spans: list[Span] = []
    for i, op in enumerate(ops):
        cost = seconds(op)
        if cost < 0:
            raise ValueError(f"{op} takes {cost} s; hint: costs are 0 or more")
        start = max([free[op.lane], *(ends[j] for j in waits[i])])
        ends.append(start + cost)
        free[op.lane] = ends[i]
        spans.append((op, start, ends[i]))
    peaks = {} if num_bytes is None else _peaks(ops, spans, num_bytes)
    return Simulation(spans, peaks)


def peaks_in_order(
    ops: Sequence[Op], num_bytes: Callable[[Buffer, Op], tuple[str, int] | None]
) -> dict[str, int]:
    """The peak of each memory when ops run one after another in program order; as in `simulate`."""
    return _peaks(ops, [(op, float(i), float(i + 1)) for i, op in enumerate(ops)], num_bytes)


def _peaks(
    ops: Sequence[Op], spans: Sequence[Span], num_bytes: Callable[[Buffer, Op], tuple[str, int] | None]
) -> dict[str, int]:
    """A buffer is alive from the start of the op that writes it first to the end of its last user."""
    changes: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    alive: dict[Buffer, tuple[str, int]] = {}
    for (op, start, end), released in zip(spans, last_uses(ops), strict=True):
        for buffer in sorted(op.writes):
            found = None if buffer in alive else num_bytes(buffer, op)
            if found is not None:
                alive[buffer] = found
                changes[found[0]].append((start, 1, found[1]))
        for buffer in released:
            if buffer in alive:
                memory, size = alive.pop(buffer)
                changes[memory].append((end, 0, -size))
    return {memory: _highest(size for _, _, size in sorted(rows)) for memory, rows in changes.items()}


def _highest(changes: Iterable[int]) -> int:
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest
