"""The schedule of a step beside which a checkpoint is written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from horizon_lm.schedule import StepSpec, build, build_save, build_steps, check, derive_waits

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def saving_plans() -> list[StepSpec]:
    plans = []
    grid = product((1, 3), (True, False), ("sync", "deferred", "eager"), (1, 2), (True, False))
    for layers, tied, update, m, prologue in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = units = frozenset({*range(0 if prologue else 1, head + 1), embedding})
        for frozen in (frozenset(), frozenset({1})):
            plans.append(
                StepSpec(
                    layers,
                    uploaded,
                    units - frozen,
                    embedding,
                    m,
                    update=update,
                    saved=units | {head + 2},  # and a unit that nothing uses
                )
            )
    return plans


SAVING = saving_plans()


def test_schedules_with_a_checkpoint_are_sound(record_property: Callable[[str, object], None]) -> None:
    for plan in SAVING:
        ops = build_steps(plan, 2)
        assert check(ops, plan) == []
    record_property("plans", len(SAVING))


def test_each_wait_of_a_write_is_needed() -> None:
    """Without any one of the waits between W and O the checker objects."""
    removed = 0
    for plan in SAVING:
        ops = build_steps(plan, 2)
        waits = derive_waits(ops)
        for i, targets in enumerate(waits):
            for j in targets:
                if "W" in (ops[i].kind, ops[j].kind):
                    fewer = [t if k != i else tuple(x for x in t if x != j) for k, t in enumerate(waits)]
                    assert any("may run before" in fault for fault in check(ops, plan, fewer))
                    removed += 1
    assert removed > 300


def test_a_write_is_between_two_updates() -> None:
    for plan in SAVING:
        ops = build_steps(plan, 2)
        for unit in plan.trainable:
            kinds = [(op.kind, op.step) for op in ops if op.kind in "OW" and op.unit == unit]
            assert kinds == [("W", 0), ("O", 0), ("W", 1), ("O", 1)]
    late = SAVING[0]
    ops = build(late, 1)
    moved = [op for op in ops if op.kind != "W"] + [op for op in ops if op.kind == "W"]
    assert any("instead of 0" in fault for fault in check(moved, late))  # the control


def test_saving_alone_updates_first() -> None:
    plan = next(p for p in SAVING if p.update == "deferred" and p.layers == 3)
    text = [str(op) for op in build_save(plan, 1, plan.trainable)]
    for unit in plan.trainable:
        assert text.index(f"O{unit}") < text.index(f"W{unit}")
