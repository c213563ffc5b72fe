"""Constructors of ops: the only place that states what each op reads and writes."""

from __future__ import annotations

from dataclasses import replace

from horizon_lm.schedule.ops import Buffer, Op
from horizon_lm.schedule.step_spec import KEEP, StepSpec

_NOTHING = frozenset({None})


def _set(*buffers: Buffer | None) -> frozenset[Buffer]:
    found = frozenset(buffers)
    return found - _NOTHING if None in found else found  # type: ignore[return-value]


def _slot(slot: int) -> Buffer | None:
    return Buffer("slot", slot) if slot >= 0 else None


def _weights(spec: StepSpec, unit: int, slot: int) -> Buffer | None:
    """Where an op finds the unit's weights: at their home if that is the device, else in a slot."""
    return Buffer("weights", unit) if unit in spec.resident else _slot(slot)


def _grad_slot(grad_slot: int) -> Buffer | None:
    return Buffer("grad_slot", grad_slot) if grad_slot >= 0 else None


def _added_to(spec: StepSpec, unit: int, m: int, grad_slot: int) -> Buffer | None:
    """The gradient slot as a read: the first micro-batch overwrites it instead."""
    return None if spec.begins(unit, m) else _grad_slot(grad_slot)


def _gradient(spec: StepSpec, unit: int, grad_slot: int) -> Buffer:
    """The buffer from which a unit's update reads its gradient.

    Eager updates of a resident unit read it in its slot.
    """
    if spec.update == "eager" and unit in spec.resident:
        return Buffer("grad_slot", grad_slot)
    slab = spec.slab(unit)
    return Buffer("grads", unit) if slab < 0 else Buffer("slab", slab)


def _call(m: int) -> Buffer:
    """The layers' arguments other than hidden states, and router logits."""
    return Buffer("call", -1, m)


def upload(unit: int, slot: int) -> Op:
    return Op("U", unit, reads=_set(Buffer("weights", unit)), writes=_set(_slot(slot)), slot=slot)


def forward(spec: StepSpec, unit: int, m: int, slot: int) -> Op:
    output, policy = Buffer("input", unit + 1, m), spec.policy(unit)
    if unit == 0:
        # The first micro-batch's op takes the rows of all: another unit may replace the table.
        rows = Buffer("rows") if m == 0 and spec.lowest_backward == 0 and not spec.evaluate else None
        table = spec.outer_slot if spec.embedding_unit in spec.uploaded else -1
        reads = _set(_weights(spec, 0, slot), _weights(spec, spec.embedding_unit, table))
        return Op("F", 0, m, reads, _set(_call(m), output, rows), slot, table=table)
    graph = Buffer("graph", unit, m) if policy else None
    reads = _set(_weights(spec, unit, slot), _call(m), Buffer("input", unit, m))
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
    reads = _set(_weights(spec, unit, slot), _call(m), Buffer("input", unit, m), added_to)
    writes = _set(_call(m), Buffer("input_grad", -1, m), Buffer("loss", -1, m), _grad_slot(grad_slot))
    return Op("L", unit, m, reads, writes, slot, grad_slot, first=spec.begins(unit, m))


def evaluate(spec: StepSpec, m: int, slot: int) -> Op:
    reads = _set(_weights(spec, spec.head, slot), _call(m), Buffer("input", spec.head, m))
    return Op("E", spec.head, m, reads, _set(Buffer("loss", -1, m)), slot)


def recompute(spec: StepSpec, unit: int, m: int, slot: int) -> Op:
    reads = _set(_weights(spec, unit, slot), _call(m), Buffer("input", unit, m))
    writes = _set(Buffer("graph", unit, m), Buffer("input", unit + 1, m))
    return Op("C", unit, m, reads, writes, slot, policy=KEEP)


def backward(spec: StepSpec, unit: int, m: int, slot: int, grad_slot: int) -> Op:
    """Reads the layer's input even if nothing is recomputed, since its graph may hold it."""
    gradient, given, graph = Buffer("input_grad", -1, m), Buffer("input", unit, m), Buffer("graph", unit, m)
    weights, added_to = _weights(spec, unit, slot), _added_to(spec, unit, m, grad_slot)
    reads = _set(weights, _call(m), graph, given, gradient, added_to)
    writes = _set(gradient, _grad_slot(grad_slot))
    return Op("B", unit, m, reads, writes, slot, grad_slot, first=spec.begins(unit, m))


def backward_prologue(spec: StepSpec, m: int, slot: int, grad_slot: int) -> Op:
    """Backward of the prologue. The last micro-batch's op adds the summed rows to the table's gradient in the
    outer slot, which for a tied table already holds the head's gradient."""
    sums = Buffer("row_grads") if spec.sums_rows else None
    table_grad = spec.outer_grad_slot if spec.sums_rows and m == spec.micro_batches - 1 else -1
    table, weights = _grad_slot(table_grad), _weights(spec, 0, slot)
    reads = _set(weights, _call(m), Buffer("rows"), Buffer("input_grad", -1, m))
    reads |= _set(_added_to(spec, 0, m, grad_slot), sums if m else None, table if spec.tied else None)
    writes = _set(_grad_slot(grad_slot), sums, table)
    first = spec.begins(0, m)
    return Op("B", 0, m, reads, writes, slot, grad_slot, table_grad=table_grad, first=first)


def from_boundary_slot(op: Op, boundary_slot: int) -> Op:
    """A C or B that reads its spilled input from a boundary slot."""
    given = Buffer("input", op.unit, op.micro_batch)
    reads = op.reads - {given} | {Buffer("boundary_slot", boundary_slot)}
    return replace(op, reads=reads, boundary_slot=boundary_slot)


def park(spec: StepSpec, unit: int, m: int, grad_slot: int, sum_slab: int) -> Op:
    """The gradient after a round; m: its last micro-batch. sum_slab: where the host adds it up."""
    target = Buffer("sum_slab", sum_slab) if spec.adds_on_host else Buffer("sum", unit)
    reads = _set(_grad_slot(grad_slot))
    return Op("P", unit, m, reads, _set(target), grad_slot=grad_slot, sum_slab=sum_slab)


def add(unit: int, m: int, sum_slab: int) -> Op:
    reads = _set(Buffer("sum_slab", sum_slab), Buffer("sum", unit) if m else None)
    return Op("S", unit, m, reads, _set(Buffer("sum", unit)), sum_slab=sum_slab, first=m == 0)


def get_back(unit: int, m: int, grad_slot: int) -> Op:
    """Runs before the first micro-batch m of a round adds to the gradient."""
    return Op("G", unit, m, _set(Buffer("sum", unit)), _set(_grad_slot(grad_slot)), grad_slot=grad_slot)


def download(spec: StepSpec, unit: int, grad_slot: int) -> Op:
    # Writes to the slot as well: parameters without a gradient are zeroed there.
    writes = _set(_gradient(spec, unit, grad_slot), Buffer("sqnorm", unit), _grad_slot(grad_slot))
    slab = spec.slab(unit)
    return Op("D", unit, reads=_set(_grad_slot(grad_slot)), writes=writes, grad_slot=grad_slot, slab=slab)


def norm(spec: StepSpec) -> Op:
    norms = {Buffer("sqnorm", unit) for unit in spec.trainable}
    if spec.update != "eager":  # read only if no download measured them
        norms |= {Buffer("grads", unit) for unit in spec.trainable}
    return Op("N", reads=frozenset(norms), writes=_set(Buffer("clip")))


def optimize(spec: StepSpec, unit: int, grad_slot: int = -1) -> Op:
    """Eager updates read the loss and their own gradient's norm, others the global norm.

    grad_slot: of an eager update on the device.
    """
    state, weights = Buffer("state", unit), Buffer("weights", unit)
    gradient = _gradient(spec, unit, grad_slot)
    reads = {gradient, state, weights}
    if spec.update == "eager":
        reads |= {Buffer("loss", -1, m) for m in range(spec.micro_batches)}
        reads.add(Buffer("sqnorm", unit))
    else:
        reads.add(Buffer("clip"))
    writes = _set(state, weights)
    if unit not in spec.resident:
        return Op("O", unit, reads=frozenset(reads), writes=writes, slab=spec.slab(unit))
    grad_slot = gradient.index if gradient.region == "grad_slot" else -1
    return Op("A", unit, reads=frozenset(reads), writes=writes, grad_slot=grad_slot)


def write(spec: StepSpec, unit: int) -> Op:
    """Reads what O or A writes, so derived waits put it after one update and before the next."""
    state = Buffer("state", unit) if unit in spec.trainable else None
    return Op("W", unit, reads=_set(Buffer("weights", unit), state))
