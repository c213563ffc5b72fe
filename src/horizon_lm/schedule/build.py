"""Build a step's ops in program order from its spec, by small passes.

Waits are not set here: they follow from what the ops read and write (`waits`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from horizon_lm.schedule import make
from horizon_lm.schedule.ops import Op
from horizon_lm.schedule.slots import place_gradients, place_in_slots, place_shares, turnaround
from horizon_lm.schedule.step_spec import SUM_SLABS, StepSpec


def build(spec: StepSpec, step: int = 0, pending: Collection[int] = ()) -> list[Op]:
    """Build one training step (forward, loss, backward, norm, update) or one evaluation.

    Layer-major: all micro-batches of a round pass through a unit before the next unit is visited. Units of
    one block (`checkpoint_interval`) are visited together, micro-batch by micro-batch; so are the last block
    and the head.
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
    """Yield the ops of each visit of each round: what is copied to the device before it, work on the round's
    micro-batches, copies to the host."""
    slots, uploads_before = place_in_slots(spec)
    grad_places, brought_before = place_gradients(spec)
    grad_slots = place_shares(spec, grad_places)
    _place_outer_uploads(spec, uploads_before)
    head_visit = turnaround(spec)
    waiting: dict[int, int] = {}  # packed units in a staging slot, and which
    for visit in range(len(spec.visits) * spec.rounds):
        number, place = divmod(visit, len(spec.visits))
        units, micro_batches = spec.visits[place], spec.micro_batches_of(number)
        ops = [op for unit, slot in uploads_before[visit] for op in _fetch(spec, unit, slot)]
        waiting |= {unit: slot for unit, slot in uploads_before[visit] if unit in spec.packed}
        used = {spec.embedding_unit, *units} if units == (0,) else {*units}
        ops += [make.unpack(unit, waiting.pop(unit)) for unit in sorted(used & waiting.keys())]
        if spec.head in spec.in_slots and units[-1] == spec.head:
            slots[visit][spec.head] = spec.outer_slot
        ops += [make.get_back(spec, unit, m, slot) for unit, m, slot in brought_before[visit]]
        if place < head_visit:
            yield ops + _forward(spec, units[0], slots[visit].get(units[0], -1), micro_batches)
            continue
        if spec.evaluate:
            slot = slots[visit].get(spec.head, -1)
            yield ops + [make.evaluate(spec, m, slot) for m in micro_batches]
            continue
        places = Places(slots[visit], grad_slots[visit], grad_places[visit])
        yield ops + _backward(spec, units, places, micro_batches)


class Places(NamedTuple):
    """Where a visit's units are: weight slots by unit; gradient slots by unit and micro-batch; where their
    gradients become complete, slots, or shards if it is shared, by unit."""

    slots: dict[int, int]
    grad_slots: dict[tuple[int, int], int]
    complete: dict[int, int]


def _fetch(spec: StepSpec, unit: int, slot: int) -> list[Op]:
    """Return the ops that bring a unit's weights into a slot."""
    upload = [make.upload(spec, unit, slot)] if unit in spec.uploaded else []
    return upload + [make.join(spec, unit, slot)] if spec.is_shared else upload


def _place_outer_uploads(spec: StepSpec, uploads_before: list[list[tuple[int, int]]]) -> None:
    """Add the uploads of table and head, which share the outer slot: each once, or once a round if they
    alternate."""
    table, head = spec.embedding_unit, spec.head
    alternate = not spec.tied and {table, head} <= spec.in_slots
    for number in range(spec.rounds if alternate else 1):
        begin = number * len(spec.visits)
        if table in spec.in_slots:
            uploads_before[begin].insert(0, (table, spec.outer_slot))
        if not spec.tied and head in spec.in_slots:  # after the table's readers and all layers' uploads
            before = begin + max(1, turnaround(spec) - spec.slots + 1)
            uploads_before[before].append((head, spec.outer_slot))


def _forward(spec: StepSpec, unit: int, slot: int, micro_batches: range) -> list[Op]:
    ops = [make.forward(spec, unit, m, slot) for m in micro_batches]
    if spec.is_spilled(unit):
        ops += [make.spill(unit, m) for m in micro_batches]
    return ops


def _backward(spec: StepSpec, units: tuple[int, ...], places: Places, micro_batches: range) -> list[Op]:
    """Backward visit of the head, the prologue, a layer, or a block of layers.

    Each micro-batch runs the block forward, then backward; the last one adds the copies to the host. For the
    block joined with the head this is its first forward.
    """
    ops: list[Op] = []
    for m in micro_batches:
        for unit in units[:-1]:
            slot = places.slots.get(unit, -1)
            first = units[-1] == spec.head
            ops.append(make.forward(spec, unit, m, slot) if first else make.recompute(spec, unit, m, slot))
        for unit in reversed(units):
            slot, grad_slot = places.slots.get(unit, -1), places.grad_slots.get((unit, m), -1)
            complete = places.complete.get(unit, -1)
            if unit == spec.head:
                ops.append(make.loss(spec, unit, m, slot, grad_slot))
            elif unit:
                ops.append(make.backward(spec, unit, m, slot, grad_slot))
            else:
                ops.append(make.backward_prologue(spec, m, slot, grad_slot))
            if unit in spec.trainable and spec.totals(unit, m):
                ops.append(make.total(spec, unit, m, grad_slot, complete))
            if unit == 0 and spec.totals_rows(m):
                ops.append(make.total_rows(spec, m))
            if m == spec.micro_batches - 1:
                ops += _downloads(spec, unit, complete)
            elif m == micro_batches[-1] and unit in spec.host_sums:
                ops += _parks(spec, unit, m, complete)
    return ops


def _parks(spec: StepSpec, unit: int, m: int, place: int) -> list[Op]:
    """Return the ops that keep a gradient in host memory until the next round."""
    if not spec.adds_on_host:
        return [make.park(spec, unit, m, place, -1)]
    sum_slab = unit % SUM_SLABS
    return [make.park(spec, unit, m, place, sum_slab), make.add(unit, m, sum_slab)]


def _downloads(spec: StepSpec, unit: int, place: int) -> list[Op]:
    """Return downloads, and eager updates, of the gradients that a unit's last backward op completes."""
    complete = [(unit, place)] if unit in spec.trainable else []
    if spec.sums_rows and unit == spec.embedding_unit:
        complete = []  # a tied head: the rows' gradients come last
    if spec.sums_rows and unit == 0:
        complete.append((spec.embedding_unit, spec.outer_grad_slot))
    ops = []
    for one, where in complete:
        ops.append(make.download(spec, one, where))
        if spec.update == "eager":
            ops.append(make.optimize(spec, one, where))
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
    losses = {op.micro_batch: i for i, op in enumerate(ops) if op.kind == "L"}
    restores: dict[int, list[Op]] = {}
    begins = [places[0] for places in users.values()]
    for k, ((unit, m), places) in enumerate(users.items()):
        boundary_slot = k % spec.boundary_slots
        for i in places:
            found[i] = make.from_boundary_slot(ops[i], boundary_slot)
        earlier = k - (spec.boundary_slots - 1)
        before = losses[m - m % spec.round_size]  # the turnaround of its round
        if earlier >= 0:
            before = max(before, begins[earlier])
        restores.setdefault(before, []).append(make.restore(unit, m, boundary_slot))
    return [made for i, op in enumerate(found) for made in [*restores.get(i, []), op]]


def _with_pending(spec: StepSpec, ops: list[Op], pending: Collection[int], step: int) -> list[Op]:
    """Insert the previous step's updates before the first use of each unit's weights."""
    waiting = {op.unit: op for op in build_flush(spec, step, pending)}  # in the order of updates
    found: list[Op] = []
    for op in ops:
        used = {buffer.index for buffer in op.reads if buffer.region == "weights"} if waiting else set()
        if not used.isdisjoint(waiting):
            found += [waiting.pop(unit) for unit in list(waiting) if unit in used]
        found.append(op)
    assert not waiting, "every trainable unit's weights are used"
    return found


def _with_writes(spec: StepSpec, ops: list[Op], step: int) -> list[Op]:
    """Insert the write of each saved unit where it is what the previous step left: after its update of that
    step, or at the start. Units updated soonest are written first, so that no update waits for long.
    """
    waiting = {unit: make.write(spec, unit).at(step) for unit in sorted(spec.saved)}
    updated = {op.unit for op in ops if op.kind in "OA" and op.step < step}
    coming = [op.unit for op in ops if op.kind in "OA" and op.step == step]
    order = [unit for unit in dict.fromkeys([*coming, *waiting]) if unit in waiting]
    found = [waiting.pop(unit) for unit in order if unit not in updated]
    for op in ops:
        found.append(op)
        if op.kind in "OA" and op.step < step and op.unit in waiting:
            found.append(waiting.pop(op.unit))
    assert not waiting
    return found
