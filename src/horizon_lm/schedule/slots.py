"""Which slot of the ring each unit of a step gets, and when it is filled."""

from __future__ import annotations

from collections.abc import Collection

from horizon_lm.schedule.step_spec import StepSpec


def place_in_slots(spec: StepSpec) -> tuple[list[dict[int, int]], list[list[tuple[int, int]]]]:
    """Assign a slot of the ring to each unit of each visit of all rounds; return slots by visit, and the
    uploads issued before it.

    An upload is issued up to `slots - 1` visits ahead, into a slot that none of those visits uses; among
    several, the one whose unit is needed last (Belady 1966). A unit still in its slot, as at the
    turnaround and between two rounds, is not uploaded again. Units of a shared step are joined then.
    """
    visits = [[u for u in units if u in spec.in_slots and u < spec.head] for units in spec.visits]
    visits = visits * spec.rounds
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


def place_gradients(spec: StepSpec) -> tuple[list[dict[int, int]], list[list[tuple[int, int, int]]]]:
    """Assign a gradient slot, or in a shared step a shard, to each trainable unit of each backward visit of
    all rounds; return slots by visit, and before each visit the gradients to bring back: (unit, first
    micro-batch to add, slot).

    They are brought back as soon as their slot is free, at most `grad_slots - 1` visits ahead.
    """
    own_places = spec.own_grad_slots or spec.own_grad_shards
    own = {unit: spec.grad_slots + 1 + k for k, unit in enumerate(own_places)}
    placed: list[dict[int, int]] = []
    brought: list[list[tuple[int, int, int]]] = [[] for _ in spec.visits * spec.rounds]
    last_visit = [-1] * spec.grad_slots  # that used the slot
    parked: dict[int, int] = {}  # last visit that computed the unit's gradient
    count, head_visit = 0, turnaround(spec)
    for visit, units in enumerate(spec.visits * spec.rounds):
        slots: dict[int, int] = {}
        number, place = divmod(visit, len(spec.visits))
        m = spec.micro_batches_of(number)[0]
        for unit in reversed(units) if place >= head_visit else ():
            if unit not in spec.trainable:
                continue
            if unit == spec.head:
                slots[unit] = spec.outer_grad_slot
            elif unit in own:
                slots[unit] = own[unit]
            else:
                slots[unit] = slot = count % spec.grad_slots
                count += 1
                if spec.continues(unit, m):
                    earliest = max(last_visit[slot] + 1, parked[unit] + 1, visit - spec.grad_slots + 1)
                    brought[earliest].append((unit, m, slot))
                last_visit[slot] = parked[unit] = visit
        placed.append(slots)
    return placed, brought


def place_shares(spec: StepSpec, placed: list[dict[int, int]]) -> list[dict[tuple[int, int], int]]:
    """Return, for each visit, the gradient slot of each unit and micro-batch. placed: by `place_gradients`.

    All micro-batches add to the unit's slot. In a shared step the gradients between two sums over ranks take
    the next slot of the ring.
    """
    found: list[dict[tuple[int, int], int]] = []
    count = 0
    for visit, places in enumerate(placed):
        slots: dict[tuple[int, int], int] = {}
        now = dict(places)
        for m in spec.micro_batches_of(visit // len(spec.visits)):
            for unit in places:
                if spec.is_shared and unit < spec.head and spec.begins(unit, m):
                    now[unit] = count % spec.grad_slots
                    count += 1
                slots[unit, m] = now[unit]
        found.append(slots)
    return found


def gradient_slots_of(spec: StepSpec, units: Collection[int]) -> set[int]:
    """Return the gradient slots in which gradients of `units` accumulate."""
    shares = place_shares(spec, place_gradients(spec)[0])
    found = {slot for slots in shares for (unit, _), slot in slots.items() if unit in units}
    adds_rows = not spec.is_shared and spec.embedding_unit in units
    return found | {spec.outer_grad_slot} if adds_rows else found


def turnaround(spec: StepSpec) -> int:
    """The number of the head's visit within a round."""
    return next(number for number, units in enumerate(spec.visits) if units[-1] == spec.head)
