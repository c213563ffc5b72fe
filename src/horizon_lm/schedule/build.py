"""A step plan becomes a list of ops in program order, by small passes.

Nothing here says what waits for what: that follows from what the ops read and write (`waits`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from horizon_lm.schedule import make
from horizon_lm.schedule.ops import Op
from horizon_lm.schedule.step_plan import StepPlan


def build(plan: StepPlan, step: int = 0, pending: Collection[int] = ()) -> list[Op]:
    """One training step: gather, forward, loss, backward, norm, update; or one evaluation.

    Layer-major: all micro-batches of a step pass through a unit before the next unit is visited.
    Units of one block (`checkpoint_interval`) are visited together, one micro-batch after another; so are
    the last block and the head, where there is room for them.
    pending: units whose update of the step before is still to come (`update: deferred`); each comes
    just before the first use of its weights.
    """
    micro_batches = range(plan.micro_batches)
    ops = [make.gather(plan, m) for m in micro_batches]
    for visit_ops in _visits(plan):
        ops += visit_ops
    if plan.evaluate:
        return [replace(op, step=step) for op in ops]
    ops = _with_restores(plan, ops)
    if plan.scatters:
        ops.append(make.scatter(plan))
        if plan.update == "eager":
            ops.append(make.optimize(plan, plan.embedding_unit))
    ops.append(make.norm(plan))
    if plan.update == "sync":
        ops += [make.optimize(plan, unit) for unit in sorted(plan.trainable)]
    ops = _with_pending(plan, [replace(op, step=step) for op in ops], pending, step - 1)
    return _with_writes(plan, ops, step)


def build_flush(plan: StepPlan, step: int, pending: Collection[int]) -> list[Op]:
    """The updates of `step` that are still to come, alone."""
    return [replace(make.optimize(plan, unit), step=step) for unit in _update_order(plan) if unit in pending]


def build_save(plan: StepPlan, step: int, pending: Collection[int]) -> list[Op]:
    """The updates before `step` that are still to come, and the writing of `plan.saved`, alone."""
    return _with_writes(plan, build_flush(plan, step - 1, pending), step)


def build_steps(plan: StepPlan, steps: int) -> list[Op]:
    """Several steps in a row, so that the seam between two of them is part of what is checked."""
    deferred = plan.update == "deferred"
    ops: list[Op] = []
    for step in range(steps):
        ops += build(plan, step, plan.trainable if deferred and step else ())
    return ops + build_flush(plan, steps - 1, plan.trainable) if deferred else ops


def _update_order(plan: StepPlan) -> list[int]:
    """Trainable units in the order in which a step first uses their weights."""
    first = [plan.embedding_unit, *range(plan.head + 1)]
    return [unit for unit in dict.fromkeys(first) if unit in plan.trainable]


def _visits(plan: StepPlan) -> Iterator[list[Op]]:
    """The ops of each visit: uploads issued before it, work on all micro-batches, downloads."""
    slots, uploads_before = place_in_slots(plan)
    grad_visits = 0
    turn = plan.visits.index(next(units for units in plan.visits if units[-1] == plan.head))
    for visit, units in enumerate(plan.visits):
        ops = [make.upload(unit, slot) for unit, slot in uploads_before[visit]]
        if visit < turn:
            yield ops + _forward(plan, units[0], slots[visit].get(units[0], -1))
            continue
        if plan.evaluate:
            slot = slots[visit].get(plan.head, -1)
            yield ops + [make.evaluate(plan, m, slot) for m in range(plan.micro_batches)]
            continue
        grad_slots = {}
        for unit in reversed(units):
            if unit in plan.trainable:
                grad_slots[unit] = grad_visits % plan.grad_slots
                grad_visits += 1
        yield ops + _backward(plan, units, slots[visit], grad_slots)


def _forward(plan: StepPlan, unit: int, slot: int) -> list[Op]:
    ops = [make.forward(plan, unit, m, slot) for m in range(plan.micro_batches)]
    if plan.is_spilled(unit):
        ops += [make.spill(unit, m) for m in range(plan.micro_batches)]
    return ops


def _backward(
    plan: StepPlan, units: tuple[int, ...], slots: dict[int, int], grad_slots: dict[int, int]
) -> list[Op]:
    """Of the head, the prologue, a layer, or a block of layers: each micro-batch climbs the block and
    comes down again, the last one with the downloads. A block below the head is climbed for the first
    time."""
    ops: list[Op] = []
    for m in range(plan.micro_batches):
        for unit in units[:-1]:
            slot = slots.get(unit, -1)
            first = units[-1] == plan.head
            ops.append(make.forward(plan, unit, m, slot) if first else make.recompute(unit, m, slot))
        for unit in reversed(units):
            slot, grad_slot = slots.get(unit, -1), grad_slots.get(unit, -1)
            if unit == plan.head:
                ops.append(make.loss(unit, m, slot, grad_slot))
            else:
                ops.append(make.backward(unit, m, slot, grad_slot))
            if m == plan.micro_batches - 1 and unit in plan.trainable:
                ops.append(make.download(plan, unit, grad_slot))
                if plan.update == "eager" and not (unit == plan.embedding_unit and plan.scatters):
                    ops.append(make.optimize(plan, unit))
    return ops


def _with_restores(plan: StepPlan, ops: list[Op]) -> list[Op]:
    """Bring spilled inputs back, `boundary_slots - 1` uses ahead of the op that needs them first.

    In a block the lowest layer's backward needs its input until the block has come down again.
    """
    found = list(ops)
    users: dict[tuple[int, int], list[int]] = {}
    for i, op in enumerate(ops):
        if op.kind in "CB" and op.unit and plan.is_spilled(op.unit):
            users.setdefault((op.unit, op.micro_batch), []).append(i)
    turn = next(i for i, op in enumerate(ops) if op.kind == "L")
    restores: dict[int, list[Op]] = {}
    begins = [places[0] for places in users.values()]
    for k, ((unit, m), places) in enumerate(users.items()):
        boundary_slot = k % plan.boundary_slots
        for i in places:
            found[i] = make.from_boundary_slot(ops[i], boundary_slot)
        earlier = k - (plan.boundary_slots - 1)
        before = begins[earlier] if earlier >= 0 else turn
        restores.setdefault(before, []).append(make.restore(unit, m, boundary_slot))
    return [made for i, op in enumerate(found) for made in [*restores.get(i, []), op]]


def _with_pending(plan: StepPlan, ops: list[Op], pending: Collection[int], step: int) -> list[Op]:
    """Put the updates of the step before in front of the first use of each unit's weights."""
    waiting = {op.unit: op for op in build_flush(plan, step, pending)}
    found: list[Op] = []
    for op in ops:
        used = plan.embedding_unit if op.kind == "G" else op.unit if op.kind == "U" else -1
        if used in waiting:
            found.append(waiting.pop(used))
        found.append(op)
    assert not waiting, "every trainable unit's weights are used"
    return found


def _with_writes(plan: StepPlan, ops: list[Op], step: int) -> list[Op]:
    """Put the writing of each saved unit where it is what the step before left: behind its update of that
    step, or else at the start. What is updated next comes first, so that no update waits for long.
    """
    waiting = {unit: replace(make.write(plan, unit), step=step) for unit in sorted(plan.saved)}
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


def place_in_slots(plan: StepPlan) -> tuple[list[dict[int, int]], list[list[tuple[int, int]]]]:
    """The slot of each unit of each visit, and which uploads are issued before it.

    An upload is issued up to `slots - 1` visits ahead, into a slot that none of those visits uses; of
    several, the one whose unit is needed last (Belady 1966). A unit that is still in its slot, as at
    the turn, is not uploaded again.
    """
    visits = [[u for u in units if u in plan.uploaded] for units in plan.visits]
    ahead = plan.slots - 1
    holds: list[int | None] = [None] * plan.slots
    used: list[int] = [-1] * plan.slots  # last visit that used the slot
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
            # Of the units of one visit the highest is done with first.
            return (-busy, later, plan.head if unit is None else unit, -slot)

        for unit in units:
            if unit not in holds:
                free = [slot for slot in range(plan.slots) if holds[slot] not in units]
                slot = max(free, key=rank)
                holds[slot] = unit
                uploads[max(used[slot] + 1, start)].append((unit, slot))
            used[holds.index(unit)] = visit
        placed.append({unit: holds.index(unit) for unit in units})
    return placed, uploads
