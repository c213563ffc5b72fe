"""Simulate a schedule on any machine: start and end of each op, and the peak of each memory.

As on real lanes, an op starts when the op before it on its lane, and all ops it waits for, have ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from horizon_lm.schedule.draw import Span
from horizon_lm.schedule.ops import Buffer, Lane, Op
from horizon_lm.schedule.waits import derive_waits, last_uses

# (memory, bytes) of a buffer that an op writes first; None if that memory exists anyway
BufferBytes = Callable[[Buffer, Op], tuple[str, int] | None]
# (memory, bytes) that an op takes while it runs
WorkingBytes = Callable[[Op], tuple[str, int] | None]
WORKING_SET = "working_set"


@dataclass(frozen=True)
class Simulation:
    """Result of a simulation.

    spans: (op, start, end) in seconds, in program order. peaks: bytes by memory. parts: bytes at each peak,
    by region of the buffers, with `working_set` for the running ops.
    """

    spans: list[Span]
    peaks: dict[str, int]
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return max((end for _, _, end in self.spans), default=0.0)

    def without_spans(self) -> Simulation:
        """Return the peaks alone."""
        return Simulation([], self.peaks, self.parts)


def simulate(
    ops: Sequence[Op],
    seconds: Callable[[Op], float],
    *,
    num_bytes: BufferBytes | None = None,
    working_bytes: WorkingBytes | None = None,
    waits: Sequence[tuple[int, ...]] | None = None,
    one_at_a_time: bool = False,
) -> Simulation:
    """Run `ops` (program order) with the given cost of each.

    seconds: how long an op takes on its lane. waits: derived when not given. one_at_a_time: no lanes, as
    on the CPU. Raises ValueError for a negative cost.
    """
    if waits is None:
        waits = [()] * len(ops) if one_at_a_time else derive_waits(ops)
    ends: list[float] = []
    # Updates on the device have a lane of their own, but compete with its computation.
    shared = {Lane.DEVICE_UPDATE: Lane.COMPUTE}
    free: dict[Lane | None, float] = defaultdict(float)
    spans: list[Span] = []
    for i, op in enumerate(ops):
        cost = seconds(op)
        if cost < 0:
            raise ValueError(f"{op} takes {cost} s; hint: costs are 0 or more")
        lane = None if one_at_a_time else shared.get(op.lane, op.lane)
        start = max([free[lane], *(ends[j] for j in waits[i])])
        ends.append(start + cost)
        free[lane] = ends[i]
        spans.append((op, start, ends[i]))
    if num_bytes is None and working_bytes is None:
        return Simulation(spans, {})
    order = [(op, float(i), float(i + 1)) for i, op in enumerate(ops)] if one_at_a_time else spans
    peaks, parts = _peaks(ops, order, num_bytes, working_bytes)
    return Simulation(spans, peaks, parts)


def _peaks(
    ops: Sequence[Op],
    spans: Sequence[Span],
    num_bytes: BufferBytes | None,
    working_bytes: WorkingBytes | None,
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Peaks by memory. A buffer lives from the start of its first writer to the end of its last user."""
    changes: dict[str, list[tuple[float, int, int, str]]] = defaultdict(list)
    alive: dict[Buffer, tuple[str, int]] = {}
    for (op, start, end), released in zip(spans, last_uses(ops), strict=True):
        taken = None if working_bytes is None else working_bytes(op)
        if taken is not None:
            changes[taken[0]] += [(start, 1, taken[1], WORKING_SET), (end, 0, -taken[1], WORKING_SET)]
        for buffer in sorted(op.writes) if num_bytes is not None else ():
            found = None if buffer in alive else num_bytes(buffer, op)  # type: ignore[misc]
            if found is not None:
                alive[buffer] = found
                changes[found[0]].append((start, 1, found[1], buffer.region))
        for buffer in released:
            if buffer in alive:
                memory, size = alive.pop(buffer)
                changes[memory].append((end, 0, -size, buffer.region))
    found_peaks = {memory: _highest(sorted(rows)) for memory, rows in changes.items()}
    return (
        {memory: peak for memory, (peak, _) in found_peaks.items()},
        {memory: parts for memory, (_, parts) in found_peaks.items()},
    )


def _highest(changes: Iterable[tuple[float, int, int, str]]) -> tuple[int, dict[str, int]]:
    """The highest running sum, and its parts."""
    now = highest = 0
    held: dict[str, int] = defaultdict(int)
    parts: dict[str, int] = {}
    for _, _, change, region in changes:
        now += change
        held[region] += change
        if now > highest:
            highest, parts = now, {name: size for name, size in held.items() if size}
    return highest, parts
