"""Every fault of a schedule, as a sentence: order, value, waste and room.

The checker knows only what ops say they read and write, and trusts nothing of the builder: it is
run over two steps in a row, so that the seam between them is checked as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from .build import StepPlan, derive_waits
from .ops import Buffer, Lane, Op

# Regions that live on between steps; everything else must be written in a step before it is read.
PERSISTENT = frozenset({"weights", "state"})


def check(ops: Sequence[Op], plan: StepPlan, waits: Sequence[tuple[int, ...]] | None = None) -> list[str]:
    """All faults found in `ops` (program order, one or more whole steps); empty when sound.

    waits: per op the indices of the ops that it waits for; derived when not given.
    """
    if waits is None:
        waits = derive_waits(ops)
    return [
        *_check_order(ops, waits),
        *_check_value(ops, plan),
        *_check_complete(ops, plan),
        *_check_waste(ops, waits),
        *_check_room(ops, plan),
    ]


def ends_before(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[int]:
    """For each op the bit set of ops that surely end before it starts, whatever the lanes do."""
    known: list[int] = []
    last: dict[Lane, int] = {}
    for i, op in enumerate(ops):
        bits = 0
        previous = [last[op.lane]] if op.lane in last else []
        for j in [*previous, *waits[i]]:
            bits |= known[j] | 1 << j
        known.append(bits)
        last[op.lane] = i
    return known


def _check_order(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[str]:
    """Any two ops of which one writes what the other touches are ordered."""
    faults = []
    for i, targets in enumerate(waits):
        faults += [f"{ops[i]} waits for {ops[j]}, which comes later" for j in targets if j >= i]
    if faults:
        return faults
    known = ends_before(ops, waits)
    touched: dict[Buffer, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        for buffer in sorted(op.reads | op.writes):
            for j in touched[buffer]:
                writes = buffer in op.writes or buffer in ops[j].writes
                if writes and not known[i] >> j & 1:
                    faults.append(
                        f"{op} ({op.lane}, step {op.step}) may run before {ops[j]} ({ops[j].lane}, "
                        f"step {ops[j].step}) has ended; both touch {buffer}"
                    )
            touched[buffer].append(i)
    return faults


def _check_value(ops: Sequence[Op], plan: StepPlan) -> list[str]:
    """Each read finds what it expects: written in this step, and of the right unit."""
    faults = []
    holds: dict[Buffer, tuple[int, int]] = {}  # (unit, step) of the last writer
    for op in ops:
        for buffer in sorted(op.reads):
            unit, step = holds.get(buffer, (-1, -1))
            if buffer.region == "slot" and (unit, step) != (op.unit, op.step):
                faults.append(f"{op} of step {op.step} needs unit {op.unit} in {buffer}, which holds {unit} of step {step}")
            elif buffer.region == "grad_slot":
                started = (unit, step) == (op.unit, op.step)
                if not started and not op.first:
                    faults.append(f"{op} of step {op.step} adds to {buffer}, which holds the gradient of unit {unit}")
            elif buffer.region not in PERSISTENT and step != op.step:
                faults.append(f"{op} of step {op.step} reads {buffer}, which this step has not written")
        if op.kind in "FLB" and op.unit in plan.uploaded and op.slot < 0:
            faults.append(f"{op} of step {op.step} has no slot to read its weights from")
        for buffer in op.writes:
            holds[buffer] = (op.unit, op.step)
    return faults


def _check_complete(ops: Sequence[Op], plan: StepPlan) -> list[str]:
    """Each unit does its work exactly once a step for each micro-batch."""
    counts = Counter((op.step, op.kind, op.unit, op.micro_batch) for op in ops)
    micro_batches = range(plan.micro_batches)
    faults = []
    for step in sorted({op.step for op in ops}):
        expected = [("G", -1, m) for m in micro_batches]
        expected += [("F", u, m) for u in range(plan.head) for m in micro_batches]
        expected += [("L", plan.head, m) for m in micro_batches]
        expected += [("B", u, m) for u in range(plan.lowest_backward, plan.head) for m in micro_batches]
        expected += [("D", u, -1) for u in plan.trainable if u <= plan.head]
        expected += [("O", u, -1) for u in plan.trainable]
        for kind, unit, m in expected:
            found = counts[step, kind, unit, m]
            if found != 1:
                faults.append(f"step {step} runs {Op(kind, unit, m)} {found} times instead of once")
    return faults


def _check_waste(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[str]:
    """No upload that nothing reads, no wait that follows from others."""
    faults = []
    unread: dict[Buffer, Op] = {}
    for op in ops:
        for buffer in op.reads:
            unread.pop(buffer, None)
        for buffer in op.writes:
            if buffer in unread and buffer not in op.reads:
                faults.append(f"{unread[buffer]} fills {buffer} and nothing reads it before {op} overwrites it")
            if op.kind == "U":
                unread[buffer] = op
    faults += [f"{op} fills {buffer} and nothing reads it" for buffer, op in unread.items()]
    minimal = derive_waits(ops)
    for i, given in enumerate(waits):
        faults += [f"{ops[i]} waits for {ops[j]}, which other waits imply" for j in given if j not in minimal[i]]
    return faults


def _check_room(ops: Sequence[Op], plan: StepPlan) -> list[str]:
    """Slots and gradient slots stay within the number that is allocated."""
    rooms = {"slot": plan.slots, "grad_slot": plan.grad_slots}
    return [
        f"{op} uses {buffer}, but only {rooms[buffer.region]} are allocated"
        for op in ops
        for buffer in sorted(op.reads | op.writes)
        if buffer.region in rooms and buffer.index >= rooms[buffer.region]
    ]
