"""Constructors of ops: the only place that states what each op reads and writes."""

from __future__ import annotations

from dataclasses import replace

from horizon_lm.schedule.ops import Buffer, Op
from horizon_lm.schedule.step_spec import KEEP, StepSpec


def _set(*buffers: Buffer | None) -> frozenset[Buffer]:
    return frozenset(b for b in buffers if b is not None)


def _slot(slot: int) -> Buffer | None:
    return Buffer("slot", slot) if slot >= 0 else None


def _grad_slot(grad_slot: int) -> Buffer | None:
    return Buffer("grad_slot", grad_slot) if grad_slot >= 0 else None


def _added_to(grad_slot: int, m: int) -> Buffer | None:
    """The gradient slot as a read: the first micro-batch overwrites it instead."""
    return _grad_slot(grad_slot) if m > 0 else None


def _host_gradient(spec: StepSpec, unit: int) -> Buffer:
    """The host buffer of a unit's gradient."""
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
        reads, writes = _set(_slot(slot), _slot(spec.outer_slot)), _set(_call(m), output, rows)
        return Op("F", 0, m, reads, writes, slot, table=spec.outer_slot)
    graph = Buffer("graph", unit, m) if policy else None
    reads = _set(_slot(slot), _call(m), Buffer("input", unit, m))
    return Op("F", unit, m, reads, _set(output, _call(m), graph), slot, policy=policy)


def spill(unit: int, m: int) -> Op:
    """Runs after the layer and drops the device copy, hence the write."""
    given = Buffer("input", unit, m)
    return Op("X", unit, m, _set(given), _set(Buffer("boundary", unit, m), given))


def restore(unit: int, m: int, boundary_slot: int) -> Op:
    target = Buffer("boundary_slot", boundary_slot)
    return Op("R", unit, m, _set(Buffer("boundary", unit, m)), _set(target), boundary_slot=boundary_slot)


def loss(unit: int, m: int, slot: int, grad_slot: int) -> Op:
    reads = _set(_slot(slot), _call(m), Buffer("input", unit, m), _added_to(grad_slot, m))
    writes = _set(_call(m), Buffer("input_grad", -1, m), Buffer("loss", -1, m), _grad_slot(grad_slot))
    return Op("L", unit, m, reads, writes, slot, grad_slot, first=m == 0)


def evaluate(spec: StepSpec, m: int, slot: int) -> Op:
    reads = _set(_slot(slot), _call(m), Buffer("input", spec.head, m))
    return Op("E", spec.head, m, reads, _set(Buffer("loss", -1, m)), slot)


def recompute(unit: int, m: int, slot: int) -> Op:
    reads = _set(_slot(slot), _call(m), Buffer("input", unit, m))
    writes = _set(Buffer("graph", unit, m), Buffer("input", unit + 1, m))
    return Op("C", unit, m, reads, writes, slot, policy=KEEP)


def backward(unit: int, m: int, slot: int, grad_slot: int) -> Op:
    """Reads the layer's input even if nothing is recomputed, since its graph may hold it."""
    gradient, given, graph = Buffer("input_grad", -1, m), Buffer("input", unit, m), Buffer("graph", unit, m)
    reads = _set(_slot(slot), _call(m), graph, given, gradient, _added_to(grad_slot, m))
    return Op("B", unit, m, reads, _set(gradient, _grad_slot(grad_slot)), slot, grad_slot, first=m == 0)


def backward_prologue(spec: StepSpec, m: int, slot: int, grad_slot: int) -> Op:
    """Backward of the prologue. The last micro-batch's op adds the summed rows to the table's gradient in the
    outer slot, which for a tied table already holds the head's gradient."""
    sums = Buffer("row_grads") if spec.sums_rows else None
    table_grad = spec.outer_grad_slot if spec.sums_rows and m == spec.micro_batches - 1 else -1
    table = _grad_slot(table_grad)
    reads = _set(_slot(slot), _call(m), Buffer("rows"), Buffer("input_grad", -1, m), _added_to(grad_slot, m))
    reads |= _set(sums if m else None, table if spec.tied else None)
    writes = _set(_grad_slot(grad_slot), sums, table)
    return Op("B", 0, m, reads, writes, slot, grad_slot, table_grad=table_grad, first=m == 0)


def from_boundary_slot(op: Op, boundary_slot: int) -> Op:
    """A C or B that reads its spilled input from a boundary slot."""
    given = Buffer("input", op.unit, op.micro_batch)
    reads = op.reads - {given} | {Buffer("boundary_slot", boundary_slot)}
    return replace(op, reads=reads, boundary_slot=boundary_slot)


def download(spec: StepSpec, unit: int, grad_slot: int) -> Op:
    # Writes to the slot as well: parameters without a gradient are zeroed there.
    writes = _set(_host_gradient(spec, unit), Buffer("sqnorm", unit), _grad_slot(grad_slot))
    slab = spec.slab(unit)
    return Op("D", unit, reads=_set(_grad_slot(grad_slot)), writes=writes, grad_slot=grad_slot, slab=slab)


def norm(spec: StepSpec) -> Op:
    norms = {Buffer("sqnorm", unit) for unit in spec.trainable}
    if spec.update != "eager":  # read only if no download measured them
        norms |= {Buffer("grads", unit) for unit in spec.trainable}
    return Op("N", reads=frozenset(norms), writes=_set(Buffer("clip")))


def optimize(spec: StepSpec, unit: int) -> Op:
    """Eager updates read the loss and their own gradient's norm, others the global norm."""
    state, weights = Buffer("state", unit), Buffer("weights", unit)
    reads = {_host_gradient(spec, unit), state, weights}
    if spec.update == "eager":
        reads |= {Buffer("loss", -1, m) for m in range(spec.micro_batches)}
        reads.add(Buffer("sqnorm", unit))
    else:
        reads.add(Buffer("clip"))
    return Op("O", unit, reads=frozenset(reads), writes=_set(state, weights), slab=spec.slab(unit))


def write(spec: StepSpec, unit: int) -> Op:
    """Reads what O writes, so derived waits put it after one update and before the next."""
    state = Buffer("state", unit) if unit in spec.trainable else None
    return Op("W", unit, reads=_set(Buffer("weights", unit), state))
