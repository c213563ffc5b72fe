"""Plans, and an authority on the order of ops beside `check`: a brute-force closure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from horizon_lm.schedule import Lane, Op, StepSpec, build_steps, derive_waits
from symbolic_steps import STEPS

Waits = Sequence[tuple[int, ...]]


def all_plans() -> Iterator[StepSpec]:
    grid = product(range(1, 7), (True, False), (True, False), (1, 3), (2, 3, 4), (1, 2))
    for layers, tied, prologue, micro_batches, slots, grad_slots in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = units = frozenset({*range(0 if prologue else 1, head + 1), embedding})
        below_the_middle = frozenset(range(layers // 2 + 2))
        choices = {frozenset(), frozenset({1}), below_the_middle, frozenset({embedding})}
        for frozen in sorted(choices, key=sorted):
            if units - frozen:
                plan = StepSpec(layers, uploaded, units - frozen, embedding, micro_batches, slots, grad_slots)
                yield plan
                if tied and head not in frozen:  # a final norm that is trained, a table that is not
                    yield replace(plan, embedding_frozen=True)


PLANS = list(all_plans())


def policy_plans() -> Iterator[StepSpec]:
    """Update modes, kept and spilled layers, blocks: every combination, on models of five layers and less."""
    grid = product(
        (1, 2, 5), (True, False), (1, 3), (1, 2, 3), ("sync", "deferred", "eager"), (0, 1, 2), (0, 1, 2)
    )
    for layers, tied, micro_batches, block, update, keep, spill in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = frozenset({*range(layers % 2, head + 1), embedding})
        yield StepSpec(
            layers,
            uploaded,
            uploaded if spill < 2 else frozenset(range(layers // 2 + 1, head + 1)),
            embedding,
            micro_batches,
            slots=max(2, block) + spill % 2,
            grad_slots=max(1 + tied, block),
            update=update,
            grad_slabs=1 + tied,
            kept=frozenset(range(layers + 1 - keep, head)) if layers > keep else frozenset(),
            checkpoint_interval=block,
            spilled=frozenset(range(1, layers + 1 - spill)) if spill else frozenset(),
            boundary_slots=1 + micro_batches % 2 + tied,
        )


POLICIES = list(policy_plans())
EVERY = PLANS + POLICIES


@cache
def prepared(plan: StepSpec) -> tuple[list[Op], list[tuple[int, ...]]]:
    ops = build_steps(plan, STEPS)
    return ops, derive_waits(ops)


def label(plan: StepSpec) -> str:
    frozen = sorted((plan.uploaded | plan.resident) - plan.trainable)
    return (
        f"layers={plan.layers} prologue={0 in plan.uploaded} tied={plan.embedding_unit == plan.head} "
        f"frozen={frozen}{'+table' * plan.embedding_frozen} micro_batches={plan.micro_batches} "
        f"slots={plan.slots}/{plan.grad_slots} {plan.update} kept={sorted(plan.kept)} "
        f"block={plan.checkpoint_interval} spilled={sorted(plan.spilled)} resident={sorted(plan.resident)} "
        f"rounds={plan.rounds} {plan.sums}" + f" world={plan.world} {plan.reduction}" * plan.is_shared
    )


def plain(**changes: Any) -> StepSpec:
    """Three layers, untied, a prologue with weights, two micro-batches, all trainable."""
    values = {
        "layers": 3,
        "trainable": frozenset(range(6)),
        "embedding_unit": 5,
        "micro_batches": 2,
    } | changes
    units = frozenset({*range(5), values["embedding_unit"]})
    values.setdefault("uploaded", units - values.get("resident", frozenset()))
    return StepSpec(**values)


def closure(ops: Sequence[Op], waits: Waits) -> list[set[int]]:
    """For each op all that end before it starts, by depth-first search over its predecessors."""
    before: list[set[int]] = []
    for i, op in enumerate(ops):
        stack = [j for j in range(i) if ops[j].lane == op.lane] + list(waits[i])
        seen: set[int] = set()
        while stack:
            j = stack.pop()
            if j not in seen:
                seen.add(j)
                stack += [k for k in range(j) if ops[k].lane == ops[j].lane] + list(waits[j])
        before.append(seen)
    return before


def random_order(ops: Sequence[Op], waits: Waits, rng: random.Random, late: Lane | None = None) -> list[int]:
    """Any order that lanes and waits allow. late: a lane that runs only when no other can."""
    queues = {lane: [i for i, op in enumerate(ops) if op.lane == lane] for lane in Lane}
    done: set[int] = set()
    order: list[int] = []
    while len(order) < len(ops):
        ready = [queue for queue in queues.values() if queue and done.issuperset(waits[queue[0]])]
        others = [queue for queue in ready if ops[queue[0]].lane is not late]
        i = rng.choice(others or ready).pop(0)
        done.add(i)
        order.append(i)
    return order
