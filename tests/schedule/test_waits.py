"""Every derived wait is needed, and nothing is released before its last reader."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_lm.schedule import Buffer, Lane, Op, StepSpec, build, check, last_uses
from horizon_lm.schedule.check import ends_before
from schedule_authorities import (
    EVERY,
    PLANS,
    POLICIES,
    Waits,
    closure,
    label,
    plain,
    prepared,
    random_order,
)
from sizes import times
from symbolic_steps import run_symbolically


def unordered_conflicts(ops: Sequence[Op], waits: Waits) -> int:
    """Pairs of ops and buffers that one of the two writes and the other touches, in no order."""
    before = closure(ops, waits)
    return sum(
        len((a.writes & (b.reads | b.writes)) | (b.writes & (a.reads | a.writes)))
        for i, b in enumerate(ops)
        for j, a in enumerate(ops[:i])
        if j not in before[i]
    )


def order_faults(faults: list[str]) -> list[str]:
    return [fault for fault in faults if "may run before" in fault]


# Order: every derived wait is needed, and the checker agrees with brute force.


def test_removing_any_one_wait_is_found() -> None:
    removed = 0
    every = times(59, 13)  # coprime to the number of values of each setting: all of them are among these
    plans = [*PLANS[::every], *POLICIES[::every]]
    for plan in plans:
        ops, waits = prepared(plan)
        for i, targets in enumerate(waits):
            for j in targets:
                fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
                faults = order_faults(check(ops, plan, fewer))
                assert faults, f"{ops[i]} need not wait for {ops[j]}: {label(plan)}"
                assert any(f.startswith(f"{ops[i]} ") and f" {ops[j]} " in f for f in faults)
                removed += 1
    print(f"\n{removed} derived waits removed one by one from {len(plans)} schedules of two steps, all found")
    assert removed > 80_000 // every  # about 87,000; more while gather and scatter waited as well


def test_removing_a_wait_gives_wrong_values_in_some_order() -> None:
    """The checker does not object for nothing: almost every wait that is missing can change the result."""
    rng, plan = random.Random(1), plain(micro_batches=1, grad_slots=1)
    ops, waits = prepared(plan)
    ends = last_uses(ops)
    harmless = []
    for i, targets in enumerate(waits):
        for j in targets:
            fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
            orders = (random_order(ops, fewer, rng) for _ in range(200))
            if all(run_symbolically(plan, ops, order, ends)[0] for order in orders):
                harmless.append((i, j))
    assert not harmless, [f"{ops[i]} after {ops[j]}" for i, j in harmless]


SMALL = [plan for plan in PLANS if plan.layers <= 2 and plan.micro_batches == 1 and len(plan.trainable) > 1]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SMALL), st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 6))
def test_order_verdict_equals_brute_force(plan: StepSpec, seed: int, drops: int, adds: int) -> None:
    """Random waits removed and added: as many unordered conflicts as the transitive closure shows."""
    rng = random.Random(seed)
    ops, derived = prepared(plan)
    waits = [set(targets) for targets in derived]
    edges = [(i, j) for i, targets in enumerate(derived) for j in targets]
    for i, j in rng.sample(edges, min(drops, len(edges))):
        waits[i].discard(j)
    for _ in range(adds):
        i = rng.randrange(1, len(ops))
        waits[i].add(rng.randrange(i))
    mutated = [tuple(sorted(targets)) for targets in waits]
    expected = unordered_conflicts(ops, mutated)
    assert len(order_faults(check(ops, plan, mutated))) == expected
    if drops > adds:
        assert expected > 0 or adds > 0


def test_brute_force_sees_both_verdicts() -> None:
    """The comparison above is not vacuous: without waits there are conflicts, with the derived ones none."""
    for plan in SMALL[::10]:
        ops, waits = prepared(plan)
        assert unordered_conflicts(ops, waits) == 0
        assert unordered_conflicts(ops, [()] * len(ops)) > 20


def test_derived_waits_are_the_transitive_reduction() -> None:
    for plan in SMALL[::5]:
        ops, waits = prepared(plan)
        before = closure(ops, waits)
        assert [{j for j in range(len(ops)) if bits >> j & 1} for bits in ends_before(ops, waits)] == before
        for i, targets in enumerate(waits):
            for j in targets:
                others = {k for k in targets if k != j} | {k for k in range(i) if ops[k].lane == ops[i].lane}
                assert not any(j == k or j in before[k] for k in others)
                assert ops[j].lane != ops[i].lane


# Releases.


def test_nothing_is_released_before_its_last_reader() -> None:
    """When the op that releases a buffer has ended, so have all that touched it since it was written."""
    for plan in EVERY[:: times(5, 1)]:  # coprime as well
        ops, waits = prepared(plan)
        ends, known = last_uses(ops), ends_before(ops, waits)
        touched: dict[Buffer, list[int]] = {}
        for i, op in enumerate(ops):
            for buffer in op.writes - op.reads:
                assert not touched.get(buffer) or buffer.region not in TRANSIENT, (
                    f"{buffer} before {op} not released"
                )
            for buffer in op.reads | op.writes:
                touched.setdefault(buffer, []).append(i)
            for buffer in ends[i]:
                assert buffer.region in TRANSIENT
                earlier = [j for j in touched.pop(buffer) if j != i]
                assert all(known[i] >> j & 1 for j in earlier), (
                    f"{op} releases {buffer} too early: {label(plan)}"
                )
                user = next((o for o in ops[i + 1 :] if buffer in o.reads | o.writes), None)
                assert user is None or buffer not in user.reads
        assert not any(buffer.region in TRANSIENT for buffer in touched), "never released"


TRANSIENT = {"slot", "grad_slot", "slab", "rows", "call", "input", "graph", "boundary", "boundary_slot"}
TRANSIENT |= {"input_grad", "row_grads"}


def test_readers_of_a_transient_buffer_are_on_one_lane() -> None:
    """Gradient slots excepted: compute adds to them, download takes them."""
    for plan in PLANS:
        lanes: dict[Buffer, set[Lane]] = {}
        for op in build(plan):
            for buffer in op.reads:
                if buffer.region in TRANSIENT:
                    lanes.setdefault(buffer, set()).add(op.lane)
        assert all(len(found) == 1 for buffer, found in lanes.items() if buffer.region != "grad_slot")


def test_a_release_one_op_too_early_gives_wrong_values() -> None:
    plan = plain()
    ops, _ = prepared(plan)
    ends = [list(buffers) for buffers in last_uses(ops)]
    caught = 0
    for i, op in enumerate(ops):
        for buffer in ends[i]:
            user = max(j for j in range(i) if buffer in ops[j].reads | ops[j].writes)
            early = [list(buffers) for buffers in ends]
            early[i].remove(buffer)
            early[user].append(buffer)
            assert not run_symbolically(plan, ops, None, early)[0], f"{buffer} after {ops[user]} before {op}"
            caught += 1
    assert caught > 40
