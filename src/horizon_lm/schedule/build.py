"""A step plan becomes a list of ops in program order; the waits between lanes are derived from it.

Units are numbered 0 (prologue), 1 .. layers, layers + 1 (head). The embedding table is never
uploaded: it is unit layers + 2, or part of the head when the two are tied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .ops import Buffer, Lane, Op

# Regions whose content lives within a step; the rest is host memory that outlives it.
TRANSIENT = frozenset({"slot", "grad_slot", "embeds", "call", "input", "input_grad", "embeds_grad"})


@dataclass(frozen=True)
class StepPlan:
    """All that the builder needs to know of a model and its settings.

    layers: number of decoder layers.
    uploaded: units that have weights to stream (a prologue often has none).
    trainable: units that have a gradient; a unit of frozen parameters has none.
    embedding_unit: unit that owns the embedding table; the head when tied.
    embedding_frozen: the table has no gradient, although other parameters of its unit may have one.
    """

    layers: int
    uploaded: frozenset[int]
    trainable: frozenset[int]
    embedding_unit: int
    micro_batches: int = 1
    slots: int = 2
    grad_slots: int = 2
    embedding_frozen: bool = False

    def __post_init__(self) -> None:
        lowest = {"layers": 1, "micro_batches": 1, "slots": 2, "grad_slots": 1}
        for name, bound in lowest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}; hint: a step needs at least {bound}")
        if self.embedding_unit not in (self.head, self.head + 1):
            raise ValueError(
                f"embedding_unit={self.embedding_unit} is neither the head nor the unit after it"
            )

    @property
    def head(self) -> int:
        return self.layers + 1

    @property
    def scatters(self) -> bool:
        """Whether gradient rows are added to the embedding table's gradient."""
        return self.embedding_unit in self.trainable and not self.embedding_frozen

    @property
    def lowest_backward(self) -> int:
        """The first unit whose backward pass is needed: nothing below it has a gradient."""
        if self.scatters:
            return 0
        return min(self.trainable, default=self.head)

    @property
    def order(self) -> list[int]:
        """Units in the order in which the compute lane visits them."""
        return [*range(self.head + 1), *range(self.layers, self.lowest_backward - 1, -1)]


def build(plan: StepPlan, step: int = 0) -> list[Op]:
    """One training step: gather, forward, loss, backward, norm, update. Layer-major: all
    micro-batches of a step pass through a unit before the next unit is visited."""
    micro_batches = range(plan.micro_batches)
    slot_of_visit, uploads_before = _place_in_slots(plan)
    ops = [_gather(plan, m) for m in micro_batches]
    grad_visits = 0
    for visit, unit in enumerate(plan.order):
        ops += [_upload(u, slot) for u, slot in uploads_before[visit]]
        slot = slot_of_visit[visit]
        grad_slot = grad_visits % plan.grad_slots if unit in plan.trainable else -1
        if visit < plan.head:
            ops += [_forward(unit, m, slot) for m in micro_batches]
            continue
        visit_ops = _loss if unit == plan.head else _backward
        ops += [visit_ops(plan, unit, m, slot, grad_slot) for m in micro_batches]
        if unit in plan.trainable:
            grad_visits += 1
            ops.append(_download(unit, grad_slot))
    if plan.scatters:
        ops.append(_scatter(plan))
    ops.append(_norm(plan))
    ops += [_optimize(unit) for unit in sorted(plan.trainable)]
    return [replace(op, step=step) for op in ops]


def build_steps(plan: StepPlan, steps: int) -> list[Op]:
    """Several steps in a row, so that the seam between two of them is part of what is checked."""
    return [op for step in range(steps) for op in build(plan, step)]


def _place_in_slots(plan: StepPlan) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Choose the slot of each visit, and which uploads are issued before it.

    An upload is issued `slots - 1` visits ahead, into the slot whose unit is needed last
    (Belady 1966). A unit that is still in its slot, as at the turn, is not uploaded again.
    """
    order = plan.order
    ahead = plan.slots - 1
    holds: list[int | None] = [None] * plan.slots
    slot_of_visit = [-1] * len(order)
    uploads: list[list[tuple[int, int]]] = [[] for _ in order]

    def next_use(unit: int | None, visit: int) -> int:
        later = (v for v in range(visit, len(order)) if order[v] == unit)
        return next(later, len(order) + 1)

    for visit, unit in enumerate(order):
        if unit not in plan.uploaded:
            continue
        if unit not in holds:
            issue = max(0, visit - ahead)
            victim = max(range(plan.slots), key=lambda s: (next_use(holds[s], issue), -s))
            holds[victim] = unit
            uploads[issue].append((unit, victim))
        slot_of_visit[visit] = holds.index(unit)
    return slot_of_visit, uploads


def derive_waits(ops: Sequence[Op]) -> list[tuple[int, ...]]:
    """For each op, the ops of other lanes that it must wait for (indices into `ops`).

    Two ops conflict when one writes what the other reads or writes. A conflict needs a wait
    unless the order follows from program order within a lane and from other waits. Candidates
    are taken latest first, which gives the smallest set: removing any wait leaves a conflict
    unordered (`check` finds it, and a test removes each of them in turn).
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
    """For each op the earlier ops it conflicts with directly: the last writer of what it reads
    or writes, and the readers since then of what it writes."""
    writer: dict[Buffer, int] = {}
    readers: dict[Buffer, set[int]] = defaultdict(set)
    found: list[set[int]] = []
    for i, op in enumerate(ops):
        mine: set[int] = set()
        for buffer in op.reads | op.writes:
            if buffer in writer:
                mine.add(writer[buffer])
        for buffer in op.writes:
            mine |= readers[buffer]
        found.append(mine - {i})
        for buffer in op.reads:
            readers[buffer].add(i)
        for buffer in op.writes:
            writer[buffer] = i
            readers[buffer] = set()
    return found


# The ops. What each reads and writes is written here and nowhere else.


def _set(*buffers: Buffer | None) -> frozenset[Buffer]:
    return frozenset(b for b in buffers if b is not None)


def _slot(slot: int) -> Buffer | None:
    return Buffer("slot", slot) if slot >= 0 else None


def _grad_slot(grad_slot: int) -> Buffer | None:
    return Buffer("grad_slot", grad_slot) if grad_slot >= 0 else None


def _added_to(grad_slot: int, m: int) -> Buffer | None:
    """The gradient slot as something read: the first micro-batch overwrites what the slot held."""
    return _grad_slot(grad_slot) if m > 0 else None


def _gather(plan: StepPlan, m: int) -> Op:
    return Op("G", -1, m, _set(Buffer("weights", plan.embedding_unit)), _set(Buffer("embeds", -1, m)))


def _upload(unit: int, slot: int) -> Op:
    return Op("U", unit, reads=_set(Buffer("weights", unit)), writes=_set(_slot(slot)), slot=slot)


def _forward(unit: int, m: int, slot: int) -> Op:
    call = Buffer("call", -1, m)  # what the layers receive beside hidden states, and router logits
    output = Buffer("input", unit + 1, m)
    if unit == 0:
        return Op("F", 0, m, _set(_slot(slot), Buffer("embeds", -1, m)), _set(call, output), slot)
    return Op("F", unit, m, _set(_slot(slot), call, Buffer("input", unit, m)), _set(output, call), slot)


def _loss(plan: StepPlan, unit: int, m: int, slot: int, grad_slot: int) -> Op:
    reads = _set(_slot(slot), Buffer("call", -1, m), Buffer("input", unit, m), _added_to(grad_slot, m))
    writes = _set(
        Buffer("call", -1, m), Buffer("input_grad", -1, m), Buffer("loss", -1, m), _grad_slot(grad_slot)
    )
    return Op("L", unit, m, reads, writes, slot, grad_slot, first=m == 0)


def _backward(plan: StepPlan, unit: int, m: int, slot: int, grad_slot: int) -> Op:
    gradient = Buffer("input_grad", -1, m)
    if unit == 0:
        reads = _set(_slot(slot), Buffer("embeds", -1, m), gradient, _added_to(grad_slot, m))
        writes = _set(Buffer("embeds_grad", -1, m), _grad_slot(grad_slot))
    else:
        reads = _set(
            _slot(slot), Buffer("call", -1, m), Buffer("input", unit, m), gradient, _added_to(grad_slot, m)
        )
        writes = _set(gradient, _grad_slot(grad_slot))
    return Op("B", unit, m, reads, writes, slot, grad_slot, first=m == 0)


def _download(unit: int, grad_slot: int) -> Op:
    # It writes to the slot as well: parameters that received no gradient are zeroed there.
    writes = _set(Buffer("grads", unit), Buffer("sqnorm", unit), _grad_slot(grad_slot))
    return Op("D", unit, reads=_set(_grad_slot(grad_slot)), writes=writes, grad_slot=grad_slot)


def _scatter(plan: StepPlan) -> Op:
    table = Buffer("grads", plan.embedding_unit)
    # The embedding's own forward is run again, so the table's weights are read as well.
    reads = [Buffer("weights", plan.embedding_unit)]
    reads += [Buffer("embeds_grad", -1, m) for m in range(plan.micro_batches)]
    # A tied table already holds the head's gradient; one of its own is overwritten.
    carried = [table] if plan.embedding_unit == plan.head else []
    return Op("S", reads=frozenset(reads + carried), writes=_set(table, Buffer("sqnorm", plan.head + 1)))


def _norm(plan: StepPlan) -> Op:
    norms = {Buffer("sqnorm", unit) for unit in plan.trainable}
    norms |= {Buffer("grads", unit) for unit in plan.trainable}  # read only where no download measured them
    if plan.scatters:
        norms.add(Buffer("sqnorm", plan.head + 1))
    return Op("N", reads=frozenset(norms), writes=_set(Buffer("clip")))


def _optimize(unit: int) -> Op:
    state, weights = Buffer("state", unit), Buffer("weights", unit)
    reads = _set(Buffer("grads", unit), Buffer("clip"), state, weights)
    return Op("O", unit, reads=reads, writes=_set(state, weights))


def last_uses(ops: Sequence[Op]) -> list[tuple[Buffer, ...]]:
    """For each op the transient buffers that nothing reads after it, until they are written anew.

    What touches a buffer last in program order waits for all that touch it before (they conflict,
    or share a lane), so nothing reads a buffer once that op has ended.
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
