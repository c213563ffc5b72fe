"""Constructors of ops: the only place that states what each op reads and writes."""

from __future__ import annotations

from dataclasses import replace

from horizon_lm.schedule.ops import Buffer, Op
from horizon_lm.schedule.step_spec import EXACT, FAST, KEEP, StepSpec

_NOTHING = frozenset({None})


def _set(*buffers: Buffer | None) -> frozenset[Buffer]:
    found = frozenset(buffers)
    return found - _NOTHING if None in found else found  # type: ignore[return-value]


def _slot(slot: int) -> Buffer | None:
    return Buffer("slot", slot) if slot >= 0 else None


def _weights(spec: StepSpec, unit: int, slot: int) -> frozenset[Buffer]:
    """Where an op finds the unit's weights: at their home if that is the device, else in a slot; those of a
    split unit in both."""
    home = Buffer("weights", unit) if unit in spec.resident and not spec.is_shared else None
    return _set(home, _slot(slot) if home is None or unit in spec.split else None)


def _grad_slot(grad_slot: int) -> Buffer | None:
    return Buffer("grad_slot", grad_slot) if grad_slot >= 0 else None


def _added_to(spec: StepSpec, unit: int, m: int, grad_slot: int) -> Buffer | None:
    """The gradient slot as a read: the first micro-batch overwrites it instead."""
    return None if spec.begins(unit, m) else _grad_slot(grad_slot)


def _held(spec: StepSpec, place: int) -> tuple[Buffer, int, int]:
    """The buffer on the device in which a gradient becomes complete, a slot or the rank's shard, and an op's
    `grad_slot` and `grad_shard` for it."""
    if not spec.is_shared:
        return Buffer("grad_slot", place), place, -1
    return Buffer("grad_shard", place), -1, place


def _gradient(spec: StepSpec, unit: int, place: int) -> Buffer:
    """The buffer from which a unit's update reads its gradient.

    Eager updates of a resident unit read it on the device.
    """
    if spec.update == "eager" and unit in spec.resident:
        return _held(spec, place)[0]
    slab = spec.slab(unit)
    return Buffer("grads", unit) if slab < 0 else Buffer("slab", slab)


def _call(m: int) -> Buffer:
    """The layers' arguments other than hidden states, and router logits."""
    return Buffer("call", -1, m)


def upload(spec: StepSpec, unit: int, slot: int) -> Op:
    """In a shared step: of the rank's share, into the buffer with the number of the slot. Of a packed unit:
    into the staging slot of that number."""
    source = "frozen" if unit in spec.split else "weights"
    reads = _set(Buffer(source, unit), Buffer("packed", unit) if unit in spec.packed else None)
    if unit in spec.packed:
        return Op("U", unit, reads=reads, writes=_set(Buffer("staging", slot)), staging=slot)
    if not spec.is_shared:
        return Op("U", unit, reads=reads, writes=_set(_slot(slot)), slot=slot)
    return Op("U", unit, reads=reads, writes=_set(Buffer("shard", slot)), shard=slot)


def unpack(unit: int, slot: int) -> Op:
    """From the staging slot into the weight slot of the same number."""
    return Op(
        "Q", unit, reads=_set(Buffer("staging", slot)), writes=_set(_slot(slot)), slot=slot, staging=slot
    )


def join(spec: StepSpec, unit: int, slot: int) -> Op:
    """Reads a resident's share at its home, like A."""
    shard = -1 if unit in spec.resident else slot
    share = Buffer("weights", unit) if shard < 0 else Buffer("shard", shard)
    return Op("J", unit, reads=_set(share), writes=_set(_slot(slot)), slot=slot, shard=shard)


def forward(spec: StepSpec, unit: int, m: int, slot: int) -> Op:
    output, policy = Buffer("input", unit + 1, m), spec.policy(unit)
    if unit == 0:
        # The first micro-batch's op takes the rows of all: another unit may replace the table.
        rows = Buffer("rows") if m == 0 and spec.lowest_backward == 0 and not spec.evaluate else None
        table = spec.outer_slot if spec.embedding_unit in spec.in_slots else -1
        reads = _weights(spec, 0, slot) | _weights(spec, spec.embedding_unit, table)
        return Op("F", 0, m, reads, _set(_call(m), output, rows), slot, table=table)
    graph = Buffer("graph", unit, m) if policy else None
    reads = _weights(spec, unit, slot) | _set(_call(m), Buffer("input", unit, m))
    return Op("F", unit, m, reads, _set(output, _call(m), graph), slot, policy=policy)


def spill(unit: int, m: int) -> Op:
    """Runs after the layer and drops the device copy, hence the write."""
    given = Buffer("input", unit, m)
    return Op("X", unit, m, _set(given), _set(Buffer("boundary", unit, m), given))


def restore(unit: int, m: int, boundary_slot: int) -> Op:
    target = Buffer("boundary_slot", boundary_slot)
    return Op("R", unit, m, _set(Buffer("boundary", unit, m)), _set(target), boundary_slot=boundary_slot)


def loss(spec: StepSpec, unit: int, m: int, slot: int, grad_slot: int) -> Op:
    added_to = _added_to(spec, unit, m, grad_slot)
    reads = _weights(spec, unit, slot) | _set(_call(m), Buffer("input", unit, m), added_to)
    writes = _set(_call(m), Buffer("input_grad", -1, m), Buffer("loss", -1, m), _grad_slot(grad_slot))
    return Op("L", unit, m, reads, writes, slot, grad_slot, first=spec.begins(unit, m))


def evaluate(spec: StepSpec, m: int, slot: int) -> Op:
    reads = _weights(spec, spec.head, slot) | _set(_call(m), Buffer("input", spec.head, m))
    return Op("E", spec.head, m, reads, _set(Buffer("loss", -1, m)), slot)


def recompute(spec: StepSpec, unit: int, m: int, slot: int) -> Op:
    reads = _weights(spec, unit, slot) | _set(_call(m), Buffer("input", unit, m))
    writes = _set(Buffer("graph", unit, m), Buffer("input", unit + 1, m))
    return Op("C", unit, m, reads, writes, slot, policy=KEEP)


def backward(spec: StepSpec, unit: int, m: int, slot: int, grad_slot: int) -> Op:
    """Reads the layer's input even if nothing is recomputed, since its graph may hold it."""
    gradient, given, graph = Buffer("input_grad", -1, m), Buffer("input", unit, m), Buffer("graph", unit, m)
    weights, added_to = _weights(spec, unit, slot), _added_to(spec, unit, m, grad_slot)
    reads = weights | _set(_call(m), graph, given, gradient, added_to)
    writes = _set(gradient, _grad_slot(grad_slot))
    return Op("B", unit, m, reads, writes, slot, grad_slot, first=spec.begins(unit, m))


def backward_prologue(spec: StepSpec, m: int, slot: int, grad_slot: int) -> Op:
    """Backward of the prologue. The last micro-batch's op adds the summed rows to the table's gradient in the
    outer slot, which for a tied table already holds the head's gradient; in a shared step V does."""
    sums = Buffer("row_grads") if spec.sums_rows else None
    adds_to_table = spec.sums_rows and m == spec.micro_batches - 1 and not spec.is_shared
    table_grad = spec.outer_grad_slot if adds_to_table else -1
    table, weights = _grad_slot(table_grad), _weights(spec, 0, slot)
    reads = weights | _set(_call(m), Buffer("rows"), Buffer("input_grad", -1, m))
    earlier = sums if m and not spec.totals_rows(m - 1) else None
    reads |= _set(_added_to(spec, 0, m, grad_slot), earlier, table if spec.tied else None)
    writes = _set(_grad_slot(grad_slot), sums, table)
    first = spec.begins(0, m)
    return Op("B", 0, m, reads, writes, slot, grad_slot, table_grad=table_grad, first=first)


def total(spec: StepSpec, unit: int, m: int, grad_slot: int, grad_shard: int) -> Op:
    # Writes to the slot as well: parameters without a gradient are zeroed there.
    given, shard, first = _grad_slot(grad_slot), Buffer("grad_shard", grad_shard), spec.begins_total(unit, m)
    reads, writes = _set(given, None if first else shard), _set(given, shard)
    return Op("T", unit, m, reads, writes, grad_slot=grad_slot, grad_shard=grad_shard, first=first)


def total_rows(spec: StepSpec, m: int) -> Op:
    """The last one adds the rows to the rank's share of the table's gradient, which for a tied table already
    holds the head's."""
    sums = Buffer("row_sums") if spec.reduction == EXACT else None
    grad_shard = spec.outer_grad_slot if m == spec.micro_batches - 1 else -1
    table = Buffer("grad_shard", grad_shard) if grad_shard >= 0 else None
    first = m == 0 or spec.reduction == FAST
    reads = _set(Buffer("row_grads"), None if first else sums, table if spec.tied else None)
    return Op("V", 0, m, reads, _set(sums, table), grad_shard=grad_shard, first=first)


def from_boundary_slot(op: Op, boundary_slot: int) -> Op:
    """A C or B that reads its spilled input from a boundary slot."""
    given = Buffer("input", op.unit, op.micro_batch)
    reads = op.reads - {given} | {Buffer("boundary_slot", boundary_slot)}
    return replace(op, reads=reads, boundary_slot=boundary_slot)


def park(spec: StepSpec, unit: int, m: int, place: int, sum_slab: int) -> Op:
    """The gradient after a round; m: its last micro-batch. place: slot or shard. sum_slab: where the host
    adds it up."""
    target = Buffer("sum_slab", sum_slab) if spec.adds_on_host else Buffer("sum", unit)
    held, slot, shard = _held(spec, place)
    return Op("P", unit, m, _set(held), _set(target), grad_slot=slot, grad_shard=shard, sum_slab=sum_slab)


def add(unit: int, m: int, sum_slab: int) -> Op:
    reads = _set(Buffer("sum_slab", sum_slab), Buffer("sum", unit) if m else None)
    return Op("S", unit, m, reads, _set(Buffer("sum", unit)), sum_slab=sum_slab, first=m == 0)


def get_back(spec: StepSpec, unit: int, m: int, place: int) -> Op:
    """Runs before the first micro-batch m of a round adds to the gradient. place: slot or shard."""
    held, slot, shard = _held(spec, place)
    return Op("G", unit, m, _set(Buffer("sum", unit)), _set(held), grad_slot=slot, grad_shard=shard)


def download(spec: StepSpec, unit: int, place: int) -> Op:
    """place: slot or shard."""
    held, slot, shard = _held(spec, place)
    # Writes to the slot as well: parameters without a gradient are zeroed there.
    writes = _set(_gradient(spec, unit, place), Buffer("sqnorm", unit), held)
    slab = spec.slab(unit)
    return Op("D", unit, reads=_set(held), writes=writes, grad_slot=slot, grad_shard=shard, slab=slab)


def norm(spec: StepSpec) -> Op:
    norms = {Buffer("sqnorm", unit) for unit in spec.trainable}
    if spec.update != "eager":  # read only if no download measured them
        norms |= {Buffer("grads", unit) for unit in spec.trainable}
    return Op("N", reads=frozenset(norms), writes=_set(Buffer("clip")))


def optimize(spec: StepSpec, unit: int, place: int = -1) -> Op:
    """Eager updates read the loss and their own gradient's norm, others the global norm.

    place: slot or shard of an eager update on the device.
    """
    state, weights = Buffer("state", unit), Buffer("weights", unit)
    gradient = _gradient(spec, unit, place)
    reads = {gradient, state, weights}
    if spec.update == "eager":
        reads |= {Buffer("loss", -1, m) for m in range(spec.micro_batches)}
        reads.add(Buffer("sqnorm", unit))
    else:
        reads.add(Buffer("clip"))
    writes = _set(state, weights)
    if unit not in spec.resident:
        return Op("O", unit, reads=frozenset(reads), writes=writes, slab=spec.slab(unit))
    slot, shard = _held(spec, place)[1:] if spec.update == "eager" else (-1, -1)
    return Op("A", unit, reads=frozenset(reads), writes=writes, grad_slot=slot, grad_shard=shard)


def write(spec: StepSpec, unit: int) -> Op:
    """Reads what O or A writes, so derived waits put it after one update and before the next."""
    state = Buffer("state", unit) if unit in spec.trainable else None
    return Op("W", unit, reads=_set(Buffer("weights", unit), state))
