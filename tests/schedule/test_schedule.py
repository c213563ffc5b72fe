"""What is built is sound and computes the right thing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from horizon_lm.schedule import build, build_flush, build_steps, check, derive_waits, last_uses
from schedule_authorities import (
    EVERY,
    PLANS,
    POLICIES,
    closure,
    label,
    plain,
    prepared,
    random_order,
)
from sizes import times
from symbolic_steps import run_symbolically

# Coprime to the number of values of each setting: all of them are among these.
GRID = EVERY[:: times(5, 1)]


def test_two_consecutive_steps_are_sound_over_the_grid() -> None:
    assert len(PLANS) > 1400 and len(POLICIES) > 900
    for plan in GRID:
        ops, waits = prepared(plan)
        assert check(ops, plan, waits) == [], label(plan)


def test_two_steps_compute_what_a_nested_loop_computes() -> None:
    for plan in GRID:
        assert run_symbolically(plan, prepared(plan)[0])[0], label(plan)


def test_any_order_that_the_waits_allow_computes_the_same_across_the_seam() -> None:
    """Released buffers are poisoned, so this also shows that nothing is released too early."""
    rng, overlapping = random.Random(0), 0
    for plan in EVERY[:: times(7, 3)]:
        ops, waits = prepared(plan)
        ends = last_uses(ops)
        for _ in range(3):
            same, order = run_symbolically(plan, ops, random_order(ops, waits, rng), ends)
            assert same, f"{label(plan)} in the order {' '.join(str(ops[i]) for i in order)}"
            steps = [ops[i].step for i in order]
            overlapping += steps != sorted(steps)
    assert overlapping > 100, "the second step never began before the first had ended"


def test_uploads_of_a_step() -> None:
    """At most twice a unit, once for the units at the turn: at most 4 bytes a parameter in bf16."""
    for plan in PLANS:
        uploads = Counter(op.unit for op in build(plan) if op.kind == "U")
        assert set(uploads) == plan.uploaded, label(plan)
        assert max(uploads.values()) <= 2
        # What is still in a slot at the turn does not cross the bus again: the last `slots` layers. Neither
        # does what has the outer slot: a tied table and its head are one upload.
        once = [u for u in plan.uploaded if u >= plan.head - plan.slots]
        assert all(uploads[u] == 1 for u in once), label(plan)
        for unit in plan.uploaded - set(once):
            needed_again = unit >= plan.lowest_backward
            assert uploads[unit] == 1 + needed_again, label(plan)


def test_uploads_do_not_depend_on_micro_batches() -> None:
    for plan in PLANS:
        if plan.micro_batches > 1:
            one, several = build(replace(plan, micro_batches=1)), build(plan)
            for kind in "UD":
                assert [str(op) for op in one if op.kind == kind] == [
                    str(op) for op in several if op.kind == kind
                ]


def test_micro_batches_pass_the_turn_one_after_another() -> None:
    """The last block is computed once, and holds one graph at a time."""
    for plan in PLANS:
        if not plan.blocks:
            continue
        ops = build(plan)
        block = plan.blocks[-1]
        assert block[-1] in plan.at_turnaround
        assert not any(op.kind == "C" and op.unit in block for op in ops)
        alive, most = set(), 0
        for op in ops:
            graphs = {b for b in op.reads | op.writes if b.region == "graph" and b.index in block}
            alive = alive | graphs if op.kind == "F" else alive - graphs
            most = max(most, len(alive))
        assert most == len(block)


def test_uploads_run_ahead() -> None:
    """An upload never has to wait for the very visit before the one that needs it: slots - 1 visits ahead."""
    for slots in (2, 3, 4):
        units = frozenset(range(1, 9))
        plan = plain(layers=6, uploaded=units, trainable=units, embedding_unit=8)
        plan = replace(plan, slots=slots)
        ops = build(plan)
        before = closure(ops, derive_waits(ops))
        for i, op in enumerate(ops):
            if op.kind == "U":
                user = next(
                    k for k in range(i, len(ops)) if op.writes & ops[k].reads and ops[k].kind in "FLB"
                )
                visits = {
                    (ops[k].kind, ops[k].unit)
                    for k in range(user)
                    if ops[k].kind in "FLB" and k not in before[i]
                }
                possible = len({(ops[k].kind, ops[k].unit) for k in range(user) if ops[k].kind in "FLB"})
                assert len(visits) >= min(slots - 1, possible), f"{op} with {slots} slots"


def test_lower_bounds_of_a_plan() -> None:
    for name, value in {"layers": 0, "micro_batches": 0, "slots": 1, "grad_slots": 0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}; hint"):
            plain(**{name: value})
    with pytest.raises(ValueError, match="embedding_unit=2"):
        plain(embedding_unit=2)
    with pytest.raises(ValueError, match="embedding_unit=5 is not uploaded; hint"):
        plain(uploaded=frozenset(range(5)))


def test_rounds_say_where_gradients_wait() -> None:
    for sums in ("", "elsewhere"):
        with pytest.raises(ValueError, match=f"sums='{sums}' with rounds=2; hint: device"):
            plain(rounds=2, sums=sums)


def test_a_step_of_one_round_in_a_run_with_device_sums() -> None:
    """It uses the slots that units have to themselves, and no slot of the ring."""
    for update in ("sync", "deferred", "eager"):
        spec = plain(update=update, sums="device")
        ops = build_steps(spec, 2)
        assert check(ops, spec) == []
        used = {op.unit: op.grad_slot for op in ops if op.kind == "B" and op.unit in spec.trainable}
        assert used == {unit: spec.outer_grad_slot + 1 + unit for unit in range(spec.head)}
        ring = build_steps(plain(update=update), 2)
        assert {op.grad_slot for op in ring if op.kind == "B"} == {0, 1}
        assert any("too small or too large" in error for error in check(ring, spec))


def test_a_step_without_trainable_units_is_forward_and_loss_alone() -> None:
    plan = plain(trainable=frozenset())
    assert {op.kind for op in build(plan)} == set("UFLN")
    assert check(build_steps(plan, 2), plan) == []


def test_uploads_of_blocks() -> None:
    """Layers that are computed again together are uploaded once for that: twice a step, as any other."""
    for plan in POLICIES:
        if plan.slots > plan.checkpoint_interval:
            uploads = Counter(op.unit for op in build(plan) if op.kind == "U")
            assert set(uploads) == plan.uploaded and max(uploads.values()) <= 2, label(plan)


def test_each_layer_is_computed_again_at_most_once() -> None:
    """Forward ops and recomputations of a step: a layer that keeps its activations runs once, any other
    once more, whether in its own backward (which continues a graph) or ahead of it in its block."""
    for plan in POLICIES:
        ops = build(plan)
        runs = Counter((op.unit, op.micro_batch) for op in ops if op.kind in "FC" and 0 < op.unit < plan.head)
        again = {op.unit for op in ops if op.kind == "F" and op.policy == "recompute"}
        for (unit, _), count in runs.items():
            expected = 1 if unit in again or plan.policy(unit) == "keep" or unit < plan.lowest_backward else 2
            assert count == expected, label(plan)


def test_deferred_updates_come_before_their_unit_is_used() -> None:
    plan = plain(update="deferred")
    ops = [str(op) for op in build(plan, 1, plan.trainable)]
    assert ops[:8] == ["O5", "U5", "O0", "U0", "O1", "U1", "F0.0", "F0.1"]
    assert [op for op in ops if op.startswith("O")] == ["O5", "O0", "O1", "O2", "O3", "O4"]
    assert ops[-1] == "N" and not any(op.startswith("O") for op in map(str, build(plan)))
    assert [str(op) for op in build_flush(plan, 1, {2, 5, 3})] == ["O5", "O2", "O3"]


def test_eager_updates_follow_their_gradient() -> None:
    plan = plain(update="eager")
    ops = [str(op) for op in build(plan)]
    for unit in range(5):
        assert ops.index(f"O{unit}") == ops.index(f"D{unit}") + 1
    assert ops[-6:] == ["B0.1", "D0", "O0", "D5", "O5", "N"]
    tied = [str(op) for op in build(plain(update="eager", embedding_unit=4, trainable=frozenset(range(5))))]
    assert tied[-3:] == ["D4", "O4", "N"]  # the table's gradient is complete only then


def test_an_evaluation_is_a_forward_pass_and_the_loss() -> None:
    for plan in [*PLANS[::20], *POLICIES[::20]]:
        plan = replace(plan, evaluate=True)
        ops = build(plan)
        assert {op.kind for op in ops} == set("UFE")
        assert check(ops, plan) == [], label(plan)
        assert not any(op.policy or op.grad_slot >= 0 for op in ops)


def test_the_schedule_is_pure() -> None:
    """No torch in this folder: planners and simulators run where there is none."""
    import subprocess
    import sys

    code = "import sys, horizon_lm.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
