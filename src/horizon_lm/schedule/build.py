"""Build a step's ops in program order from its spec, by small passes.

Waits are not set here: they follow from what the ops read and write (`waits`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from horizon_lm.schedule import make
from horizon_lm.schedule.ops import Op
from horizon_lm.schedule.step_spec import StepSpec


def build(spec: StepSpec, step: int = 0, pending: Collection[int] = ()) -> list[Op]:
    """Build one training step (forward, loss, backward, norm, update) or one evaluation.

    Layer-major: all micro-batches pass through a unit before the next unit is visited. Units of one block
    (`checkpoint_interval`) are visited together, micro-batch by micro-batch; so are the last block and the
    head.
    pending: units whose update of the previous step is pending (`update: deferred`); each update runs just
    before its weights are first used.
    """
    ops = [op for visit_ops in _visits(spec) for op in visit_ops]
    if spec.evaluate:
        return [op.at(step) for op in ops]
    ops = _with_restores(spec, ops)
    ops.append(make.norm(spec))
    if spec.update == "sync":
        ops += [make.optimize(spec, unit) for unit in sorted(spec.trainable)]
    ops = _with_pending(spec, [op.at(step) for op in ops], pending, step - 1)
    return _with_writes(spec, ops, step)


def build_flush(spec: StepSpec, step: int, pending: Collection[int]) -> list[Op]:
    """Build only the pending updates of `step`."""
    return [make.optimize(spec, unit).at(step) for unit in _update_order(spec) if unit in pending]


def build_save(spec: StepSpec, step: int, pending: Collection[int]) -> list[Op]:
    """Build only the pending updates before `step`, and the writes of `spec.saved`."""
    return _with_writes(spec, build_flush(spec, step - 1, pending), step)


def build_steps(spec: StepSpec, steps: int) -> list[Op]:
    """Build several consecutive steps, so that the seam between two of them is checked too."""
    deferred = spec.update == "deferred"
    ops: list[Op] = []
    for step in range(steps):
        ops += build(spec, step, spec.trainable if deferred and step else ())
    return ops + build_flush(spec, steps - 1, spec.trainable) if deferred else ops


def _update_order(spec: StepSpec) -> list[int]:
    """Trainable units, in the order in which a step first uses their weights."""
    first = [spec.embedding_unit, *range(spec.head + 1)]
    return [unit for unit in dict.fromkeys(first) if unit in spec.trainable]


def _visits(spec: StepSpec) -> Iterator[list[Op]]:
    """Yield the ops of each visit: uploads issued before it, work on all micro-batches, downloads."""
    slots, uploads_before = place_in_slots(spec)
    grad_visits = 0
    turnaround = spec.visits.index(next(units for units in spec.visits if units[-1] == spec.head))
    uploads_before[0].insert(0, (spec.embedding_unit, spec.outer_slot))
    if not spec.tied and spec.head in spec.uploaded:  # after the table's readers and all layers' uploads
        uploads_before[max(1, turnaround - spec.slots + 1)].append((spec.head, spec.outer_slot))
    for visit, units in enumerate(spec.visits):
        ops = [make.upload(unit, slot) for unit, slot in uploads_before[visit]]
        if spec.head in spec.uploaded and units[-1] == spec.head:
            slots[visit][spec.head] = spec.outer_slot
        if visit < turnaround:
            yield ops + _forward(spec, units[0], slots[visit].get(units[0], -1))
            continue
        if spec.evaluate:
            slot = slots[visit].get(spec.head, -1)
            yield ops + [make.evaluate(spec, m, slot) for m in range(spec.micro_batches)]
            continue
        grad_slots = {}
        for unit in reversed(units):
            if unit in spec.trainable and unit < spec.head:
                grad_slots[unit] = grad_visits % spec.grad_slots
                grad_visits += 1
        if spec.head in spec.trainable and units[-1] == spec.head:
            grad_slots[spec.head] = spec.outer_grad_slot
        yield ops + _backward(spec, units, slots[visit], grad_slots)


def _forward(spec: StepSpec, unit: int, slot: int) -> list[Op]:
    ops = [make.forward(spec, unit, m, slot) for m in range(spec.micro_batches)]
    if spec.is_spilled(unit):
        ops += [make.spill(unit, m) for m in range(spec.micro_batches)]
    return ops


def _backward(
    spec: StepSpec, units: tuple[int, ...], slots: dict[int, int], grad_slots: dict[int, int]
) -> list[Op]:
    """Backward visit of the head, the prologue, a layer, or a block of layers.

    Each micro-batch runs the block forward, then backward; the last one adds the downloads. For the block
    joined with the head this is its first forward.
    """
    ops: list[Op] = []
    for m in range(spec.micro_batches):
        for unit in units[:-1]:
            slot = slots.get(unit, -1)
            first = units[-1] == spec.head
            ops.append(make.forward(spec, unit, m, slot) if first else make.recompute(unit, m, slot))
        for unit in reversed(units):
            slot, grad_slot = slots.get(unit, -1), grad_slots.get(unit, -1)
            if unit == spec.head:
                ops.append(make.loss(unit, m, slot, grad_slot))
            elif unit:
                ops.append(make.backward(unit, m, slot, grad_slot))
            else:
                ops.append(make.backward_prologue(spec, m, slot, grad_slot))
            if m == spec.micro_batches - 1:
                ops += _downloads(spec, unit, grad_slot)
    return ops


def _downloads(spec: StepSpec, unit: int, grad_slot: int) -> list[Op]:
    """Return downloads, and eager updates, of the gradients that a unit's last backward op completes."""
    complete = [(unit, grad_slot)] if unit in spec.trainable else []
    if spec.sums_rows and unit == spec.embedding_unit:
        complete = []  # a tied head: the rows' gradients come last
    if spec.sums_rows and unit == 0:
        complete.append((spec.embedding_unit, spec.outer_grad_slot))
    ops = []
    for one, place in complete:
        ops.append(make.download(spec, one, place))
        if spec.update == "eager":
            ops.append(make.optimize(spec, one))
    return ops


def _with_restores(spec: StepSpec, ops: list[Op]) -> list[Op]:
    """Restore spilled inputs, `boundary_slots - 1` uses ahead of the op that needs them first.

    The lowest layer of a block needs its input until the block's backward ends.
    """
    found = list(ops)
    users: dict[tuple[int, int], list[int]] = {}
    for i, op in enumerate(ops):
        if op.kind in "CB" and op.unit and spec.is_spilled(op.unit):
            users.setdefault((op.unit, op.micro_batch), []).append(i)
    turnaround = next(i for i, op in enumerate(ops) if op.kind == "L")
    restores: dict[int, list[Op]] = {}
    begins = [places[0] for places in users.values()]
    for k, ((unit, m), places) in enumerate(users.items()):
        boundary_slot = k % spec.boundary_slots
        for i in places:
            found[i] = make.from_boundary_slot(ops[i], boundary_slot)
        earlier = k - (spec.boundary_slots - 1)
        before = begins[earlier] if earlier >= 0 else turnaround
        restores.setdefault(before, []).append(make.restore(unit, m, boundary_slot))
    return [made for i, op in enumerate(found) for made in [*restores.get(i, []), op]]


def _with_pending(spec: StepSpec, ops: list[Op], pending: Collection[int], step: int) -> list[Op]:
    """Insert the previous step's updates before the first use of each unit's weights."""
    waiting = {op.unit: op for op in build_flush(spec, step, pending)}
    found: list[Op] = []
    for op in ops:
        if op.kind == "U" and op.unit in waiting:
            found.append(waiting.pop(op.unit))
        found.append(op)
    assert not waiting, "every trainable unit's weights are used"
    return found


def _with_writes(spec: StepSpec, ops: list[Op], step: int) -> list[Op]:
    """Insert the write of each saved unit where it is what the previous step left: after its update of that
    step, or at the start. Units updated soonest are written first, so that no update waits for long.
    """
    waiting = {unit: make.write(spec, unit).at(step) for unit in sorted(spec.saved)}
    updated = {op.unit for op in ops if op.kind == "O" and op.step < step}
    coming = [op.unit for op in ops if op.kind == "O" and op.step == step]
    order = [unit for unit in dict.fromkeys([*coming, *waiting]) if unit in waiting]
    found = [waiting.pop(unit) for unit in order if unit not in updated]
    for op in ops:
        found.append(op)
        if op.kind == "O" and op.step < step and op.unit in waiting:
            found.append(waiting.pop(op.unit))
    assert not waiting
    return found


def place_in_slots(spec: StepSpec) -> tuple[list[dict[int, int]], list[list[tuple[int, int]]]]:
    """Assign a slot of the ring to each unit of each visit; return slots by visit, and the uploads issued
    before it.

    An upload is issued up to `slots - 1` visits ahead, into a slot that none of those visits uses; among
    several, the one whose unit is needed last (Belady 1966). A unit still in its slot, as at the
    turnaround, is not uploaded again.
    """
    visits = [[u for u in units if u in spec.uploaded and u < spec.head] for units in spec.visits]
    ahead = spec.slots - 1
    holds: list[int | None] = [None] * spec.slots
    used: list[int] = [-1] * spec.slots  # last visit that used the slot
    uses: dict[int | None, list[int]] = {None: []}
    for visit, units in enumerate(visits):
        for unit in units:
            uses.setdefault(unit, []).append(visit)
    placed: list[dict[int, int]] = []
    uploads: list[list[tuple[int, int]]] = [[] for _ in visits]
    for visit, units in enumerate(visits):
        start = max(0, visit - ahead)

        def rank(slot: int, visit: int = visit, start: int = start) -> tuple[int, int, int, int]:
            unit = holds[slot]
            later = next((v for v in uses[unit] if v >= visit), len(visits) + 1)
            busy = max(used[slot] + 1, start)  # the visit before which the upload can be issued
            # The highest unit of a visit is finished first.
            return (-busy, later, spec.head if unit is None else unit, -slot)

        for unit in units:
            if unit not in holds:
                free = [slot for slot in range(spec.slots) if holds[slot] not in units]
                slot = max(free, key=rank)
                holds[slot] = unit
                uploads[max(used[slot] + 1, start)].append((unit, slot))
            used[holds.index(unit)] = visit
        placed.append({unit: holds.index(unit) for unit in units})
    return placed, uploads
