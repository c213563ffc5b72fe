"""Schedules of several ranks: each is sound, all together end, and any difference is found."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import combinations, pairwise

import pytest

from horizon_lm.schedule import (
    Buffer,
    Lane,
    Op,
    StepSpec,
    build,
    build_save,
    build_steps,
    check,
    check_world,
    derive_waits,
    digest,
    last_uses,
    simulate,
)
from horizon_lm.schedule.check import ends_before
from horizon_lm.schedule.world import is_collective
from random_specs import check_by_running, described, random_steps, random_world_spec, whole_spec
from ranks_in_random_order import Stuck, random_order_of_ranks, run_ranks
from schedule_authorities import EVERY, Waits, plain, prepared, random_order
from sizes import SOAK, times
from symbolic_steps import STEPS, run_symbolically

EXACT, FAST = {"world": 4, "reduction": "exact"}, {"world": 4, "reduction": "fast"}
ALONE = {"reduction": "exact"}  # one rank that works as one of several
TIED = {"embedding_unit": 4, "trainable": frozenset(range(5))}
# Every kind of op and all ways to update, in shared steps.
PLANS = [
    plain(**EXACT),
    plain(**FAST, micro_batches=3),
    plain(**EXACT, **TIED, update="eager", resident=frozenset({2, 4}), grad_slots=1),
    plain(**FAST, **TIED, update="deferred", resident=frozenset(range(5))),
    plain(**EXACT, update="deferred", micro_batches=3, rounds=2, sums="host", resident=frozenset({1, 5})),
    plain(**FAST, update="eager", micro_batches=4, rounds=2, sums="device", resident=frozenset({4})),
    plain(**EXACT, checkpoint_interval=2, spilled=frozenset({1}), kept=frozenset({3}), saved=frozenset({1})),
    plain(
        **EXACT, micro_batches=3, rounds=3, sums="add", trainable=frozenset({0, 2, 4}), saved=frozenset({2})
    ),
    plain(**ALONE, update="deferred", micro_batches=4, rounds=2, sums="add", resident=frozenset({1, 5})),
]


def specs(request: pytest.FixtureRequest, count: int, **most: int) -> Iterator[tuple[StepSpec, list[Op]]]:
    """Random specs and two steps of each; other ones each time in `make soak`."""
    seed = request.config.getoption("--hypothesis-seed") if SOAK else 0
    rng = random.Random(f"{request.node.name} {seed}")
    for _ in range(count):
        spec = random_world_spec(rng, **most)
        yield spec, random_steps(spec, rng)


# One rank.


def test_one_rank_builds_the_ops_of_before() -> None:
    """Digests of the commit before several ranks, whose ops had neither `shard` nor `grad_shard`."""
    grid, some, rng = hashlib.sha256(), hashlib.sha256(), random.Random(19)
    for plan in EVERY[::7]:
        grid.update(digest(prepared(plan)[0]).encode())
    for _ in range(300):
        some.update(digest(random_steps(whole_spec(rng), rng)).encode())
    assert grid.hexdigest() == "215ad0441a3f437579b206b92bca8f6faa2ff2a5b5d95492eca64e0cebe5f2b7"
    assert some.hexdigest() == "f42fea290b9d12557d6492558893272aa611a9d438bb01c9f46794c8a4d24568"


def test_what_a_spec_says_of_ranks() -> None:
    with pytest.raises(ValueError, match="world=0; hint"):
        plain(world=0)
    for reduction in ("", "sum"):
        with pytest.raises(ValueError, match=f"reduction='{reduction}' with world=2; hint: exact | fast"):
            plain(world=2, reduction=reduction)
    for reduction in ("fast", "sum"):
        with pytest.raises(ValueError, match=f"reduction='{reduction}' with world=1; hint: \"\" | exact"):
            plain(reduction=reduction)
    shared = (plain(**EXACT), plain(**FAST), plain(reduction="exact"))
    assert all(spec.is_shared for spec in shared) and not plain().is_shared


# Each rank's schedule.


def test_random_schedules_are_sound_and_right(request: pytest.FixtureRequest) -> None:
    """In program order and in a random one with poisoned buffers: the losses, weights and checkpoints of a
    plain nested loop."""
    rng, kinds = random.Random(0), Counter[str]()
    for spec, ops in specs(request, times(500, 10_000)):
        check_by_running(spec, ops, rng)
        kinds.update({op.kind for op in ops})
    assert set("UJFXLRCBTVPGDNOAW") == kinds.keys() and min(kinds.values()) > 30, kinds


def test_evaluations_are_sound(request: pytest.FixtureRequest) -> None:
    for spec, _ in specs(request, times(100, 2_000)):
        spec = replace(spec, evaluate=True, rounds=1, saved=frozenset())
        ops = build(spec)
        assert check(ops, spec) == [], described(spec)
        assert {op.kind for op in ops} <= set("UJFE")
        assert {op.unit for op in ops if op.kind == "J"} == spec.uploaded | spec.resident


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_removing_any_one_wait_is_found(plan: StepSpec) -> None:
    ops, waits = prepared(plan)
    assert check(ops, plan, waits) == []
    for i, targets in enumerate(waits):
        for j in targets:
            fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
            faults = [fault for fault in check(ops, plan, fewer) if "may run before" in fault]
            assert any(f.startswith(f"{ops[i]} ") and f" {ops[j]} " in f for f in faults), (
                f"{ops[i]} need not wait for {ops[j]}"
            )


@pytest.mark.parametrize("plan", PLANS[:3], ids=range(3))
def test_removing_a_wait_gives_wrong_values_in_some_order(plan: StepSpec) -> None:
    """Those of ops between ranks: the checker does not object for nothing."""
    rng = random.Random(1)
    ops, waits = prepared(plan)
    ends = last_uses(ops)
    harmless = []
    for i, targets in enumerate(waits):
        for j in targets:
            if ops[i].lane is not Lane.NETWORK and ops[j].lane is not Lane.NETWORK:
                continue
            fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
            orders = (random_order(ops, fewer, rng, late=ops[j].lane) for _ in range(30))
            if all(run_symbolically(plan, ops, order, ends)[0] for order in orders):
                harmless.append(f"{ops[i]} after {ops[j]}")
    assert not harmless, harmless


def test_a_share_is_read_before_it_is_updated(request: pytest.FixtureRequest) -> None:
    """On the CPU the buffer of a share is the store itself: J has read it when O writes to it, although J
    declares only the buffer."""
    seen = 0
    for spec, ops in specs(request, times(200, 2_000)):
        known, joins = ends_before(ops, derive_waits(ops)), dict[int, list[int]]()
        for i, op in enumerate(ops):
            if op.kind == "J":
                joins.setdefault(op.unit, []).append(i)
            elif op.kind in "OA":
                assert all(known[i] >> j & 1 for j in joins.get(op.unit, [])), described(spec)
                seen += len(joins.get(op.unit, []))
    assert seen > 1_000


def test_collectives_of_a_step(request: pytest.FixtureRequest) -> None:
    """Exact: one sum a unit and micro-batch. Fast: one a unit and round, one for the head. Each upload has a
    gather, and so have residents, whose weights cross the network too."""
    for spec, _ in specs(request, times(200, 2_000)):
        ops = build(spec)
        count = Counter((op.kind, op.unit) for op in ops)
        for unit in spec.trainable - {spec.head + 1}:
            of_fast = 1 if unit == spec.head else spec.rounds
            assert count["T", unit] == (spec.micro_batches if spec.reduction == "exact" else of_fast)
        of_rows = spec.micro_batches if spec.reduction == "exact" else 1
        assert count["V", 0] == (of_rows if spec.sums_rows else 0)
        for unit in spec.uploaded | spec.resident:
            assert count["J", unit] and count["U", unit] == (unit in spec.uploaded) * count["J", unit]
        assert not any(op.kind == "S" for op in ops)


def test_each_op_follows_what_it_is_for() -> None:
    text = " ".join(map(str, build(PLANS[0])))
    for some in ("U5 J5 U0 J0", "L4.0 T4.0 B3.0 T3.0", "B0.1 T0.1 V0.1 D0 D5 N"):
        assert some in text
    slots = [op.grad_slot for op in build(plain(**EXACT, micro_batches=3)) if op.kind == "B"]
    assert slots == [k % 2 for k in range(len(slots))]  # each micro-batch takes the next
    fast = " ".join(map(str, build(PLANS[1])))
    assert "B2.0 B2.1 B2.2 T2.2 D2" in fast and "B0.2 T0.2 V0.2 D0 D5 N" in fast


def test_pending_updates_and_checkpoints_are_those_of_one_rank() -> None:
    for plan in (PLANS[3], PLANS[4]):
        alone = replace(plan, world=1, reduction="", saved=frozenset({1, 2}))
        shared = replace(plan, saved=frozenset({1, 2}))
        assert build_save(shared, 1, plan.trainable) == build_save(alone, 1, plan.trainable)


# All ranks together.


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_four_ranks_end_in_any_order(plan: StepSpec) -> None:
    """Each with lanes of its own: in 200 orders that the waits allow, the values of a nested loop over ranks
    and micro-batches."""
    ops, waits = prepared(plan)
    ends = last_uses(ops)
    for seed in range(times(25, 500)):
        assert run_ranks(plan, [ops] * 4, [waits] * 4, ends, random.Random(seed)), seed
    assert check_world([ops] * 4) == []


def test_random_specs_end_in_a_random_order(request: pytest.FixtureRequest) -> None:
    rng = random.Random(2)
    for spec, ops in specs(request, times(100, 2_000), layers=3, micro_batches=4):
        waits = derive_waits(ops)
        assert check_world([ops] * spec.world, [waits] * spec.world) == []
        assert run_ranks(spec, [ops] * 3, [waits] * 3, last_uses(ops), rng), described(spec)


def test_ranks_that_do_not_wait_compute_something_else() -> None:
    """The control of the two above: without the waits of one kind of collective."""
    plan = plain(**EXACT, trainable=frozenset(range(1, 6)))
    ops, waits = prepared(plan)
    ends = last_uses(ops)
    for kind in "JTV":
        fewer = [() if op.kind == kind else targets for op, targets in zip(ops, waits, strict=True)]
        runs = [run_ranks(plan, [ops] * 4, [fewer] * 4, ends, random.Random(s)) for s in range(20)]
        assert not all(runs), kind


def network(ops: Sequence[Op]) -> list[int]:
    return [i for i, op in enumerate(ops) if op.lane is Lane.NETWORK]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_a_collective_missing_on_one_rank_is_found(plan: StepSpec) -> None:
    """By the rank itself, and by all together."""
    ops = build_steps(plan, STEPS)
    for i in network(ops):
        fewer = [*ops[:i], *ops[i + 1 :]]
        assert check(fewer, plan), f"without {ops[i]}"
        (fault, *_) = check_world([ops, ops, fewer, ops])
        assert fault.startswith("rank 2 runs ") and f"where rank 0 runs {ops[i]} " in fault
        assert digest(fewer) != digest(ops)


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_collectives_swapped_on_one_rank_are_found(plan: StepSpec) -> None:
    """Neighbours and others. The rank itself finds those that change its result; others, as the gathers of
    two units, only all ranks together, which also see that they would wait for each other."""
    ops, waits = prepared(plan)
    places, found = network(ops), Counter[str]()
    pairs = list(pairwise(places))
    others = [pair for pair in combinations(places, 2) if pair not in pairs]
    for i, j in pairs + random.Random(0).sample(others, min(len(others), times(40, 2_000))):
        other = [*ops[:i], ops[j], *ops[i + 1 : j], ops[i], *ops[j + 1 :]]
        assert (digest(other) == digest(ops)) == (ops[i] == ops[j])
        alone = bool(check(other, plan))
        if (str(ops[i]), ops[i].step) == (str(ops[j]), ops[j].step):  # a unit gathered twice
            assert alone or ops[i] == ops[j]
            continue
        faults = check_world([ops, other, ops], [waits, derive_waits(other), waits])
        assert faults[0].startswith("rank 1 runs "), f"{ops[i]} and {ops[j]}"
        assert faults[-1].startswith("no rank can go on: "), f"{ops[i]} and {ops[j]}"
        found["alone" if alone else "together"] += 1
    assert found["alone"] > 10 and (found["together"] or plan in (PLANS[1], PLANS[7])), found


def test_updates_that_wait_for_each_other_across_ranks_are_found() -> None:
    """All ranks run the same collectives in the same order, but rank 0 looks at unit 3's gradient after the
    sum of unit 2, and rank 1 the other way round. Either alone ends."""
    plan = plain(**EXACT, update="eager", micro_batches=1)
    ops, waits = prepared(plan)
    update, total = (next(i for i, op in enumerate(ops) if str(op) == text) for text in ("O3", "T2.0"))
    first, second = [list(waits) for _ in range(2)]
    first[update] = (*waits[update], total)
    second[total] = (*waits[total], update)
    assert check_world([ops, ops], [first, first]) == check_world([ops, ops], [second, second]) == []
    (fault,) = check_world([ops, ops], [first, second])
    assert fault == (
        "no rank can go on: T2.0 of step 0, which waits for O3 of step 0, which waits for T2.0 of step 0"
    )
    with pytest.raises(Stuck):
        list(random_order_of_ranks([ops, ops], [first, second], random.Random(0)))
    assert list(random_order_of_ranks([ops, ops], [first, first], random.Random(0)))


def test_the_verdict_on_all_ranks_is_that_of_a_run() -> None:
    """Ranks whose ops and waits were changed at random end if, and only if, no fault is found."""
    rng, verdicts = random.Random(4), Counter[bool]()
    for _ in range(times(400, 10_000)):
        ops, waits = prepared(rng.choice(PLANS))
        lists, all_waits = [ops] * 3, [list(waits) for _ in range(3)]
        for rank in rng.sample(range(3), rng.randint(1, 2)):
            lists[rank], all_waits[rank] = disturbed(ops, waits, rng)
        try:
            list(random_order_of_ranks(lists, all_waits, rng))
            ended = True
        except Stuck:
            ended = False
        faults = check_world(lists, all_waits)
        assert ended == (faults == []), faults
        verdicts[ended] += 1
    assert min(verdicts.values()) > 50 and len(verdicts) == 2, verdicts


def disturbed(ops: list[Op], waits: Waits, rng: random.Random) -> tuple[list[Op], list[tuple[int, ...]]]:
    """One op moved, or left out, with new waits; or a wait on a later or earlier op more."""
    choice = rng.randrange(4)
    i = rng.randrange(len(ops))
    others = [*ops[:i], *ops[i + 1 :]]
    if choice == 0:
        return others, derive_waits(others)
    if choice == 1:
        others.insert(max(0, min(i + rng.randint(-6, 6), len(others))), ops[i])
        return others, derive_waits(others)
    more = list(waits)
    j = rng.randrange(len(ops)) if choice == 2 else max(0, i - rng.randint(1, 20))
    more[i] = (*more[i], j)
    return ops, more


def test_a_digest_tells_all_fields() -> None:
    op = Op("T", 3, 1, frozenset({Buffer("grad_slot", 1)}), frozenset({Buffer("grad_shard", 0)}))
    others = {
        field.name: not getattr(op, field.name) if isinstance(getattr(op, field.name), bool) else 7
        for field in fields(Op)
    } | {"kind": "J", "reads": op.writes, "writes": op.reads, "policy": "keep"}
    found = {digest([replace(op, **{name: value})]) for name, value in others.items()}  # type: ignore[arg-type]
    assert len(found | {digest([op])}) == len(fields(Op)) + 1
    assert digest([op, op]) != digest([op]) and digest([replace(op)]) == digest([op])
    plans = {digest(build(plan)) for plan in [*PLANS, *(replace(p, slots=3) for p in PLANS)]}
    assert len(plans) == 2 * len(PLANS)


# Simulated.


def test_the_network_is_a_lane_like_others() -> None:
    """It works beside the others, and binds when it is slow."""
    plan = plain(
        **EXACT, layers=6, trainable=frozenset(range(9)), embedding_unit=8, uploaded=frozenset(range(9))
    )
    ops = build(plan)
    collectives = len(network(ops))
    fast = simulate(ops, lambda op: 0.1 if op.lane is Lane.NETWORK else 1.0)
    slow = simulate(ops, lambda op: 10.0 if op.lane is Lane.NETWORK else 1.0)
    assert fast.seconds < 0.1 * collectives + sum(op.lane is not Lane.NETWORK for op in ops)
    assert 10 * collectives <= slow.seconds < 10 * collectives + 40
    last: float = 0
    for op, start, end in slow.spans:
        if op.lane is Lane.NETWORK:
            assert start >= last
            last = end


def test_which_ops_ranks_run_together() -> None:
    found = {op.kind for plan in PLANS for op in prepared(plan)[0] if is_collective(op)}
    assert found == set("JTVNOA")  # O and A of eager updates, which look at all ranks' gradients
    assert not any(is_collective(op) for op in prepared(PLANS[0])[0] if op.kind in "OA")
