"""Random specs: residents, rounds, sums, policies, spills, blocks, ties, frozen, pending and saved units."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from horizon_lm.schedule import Op, StepSpec, build, check, derive_waits
from random_specs import check_by_running, described, random_spec, random_steps
from sizes import SOAK, times


def specs(request: pytest.FixtureRequest, count: int, **most: int) -> list[tuple[StepSpec, list[Op]]]:
    """Specs and two steps of each; other ones each time in `make soak`."""
    seed = request.config.getoption("--hypothesis-seed") if SOAK else 0
    rng = random.Random(f"{request.node.name} {seed}")
    found = [random_spec(rng, **most) for _ in range(count)]
    return [(spec, random_steps(spec, rng)) for spec in found]


def test_random_schedules_are_sound_and_right(request: pytest.FixtureRequest) -> None:
    """In program order and in a random one with poisoned buffers: the losses, weights and checkpoints of a
    plain nested loop."""
    rng, kinds = random.Random(0), Counter[str]()
    for spec, ops in specs(request, times(300, 10_000)):
        check_by_running(spec, ops, rng)
        kinds.update({op.kind for op in ops})
    assert set("UQFXLRCBPSGDNOAW") == kinds.keys() and min(kinds.values()) > 20, kinds


def test_removing_a_wait_from_a_random_schedule_is_found(request: pytest.FixtureRequest) -> None:
    """Up to twelve waits of each; pairs of every kind of op that waits for another."""
    rng, removed = random.Random(1), Counter[str]()
    for spec, ops in specs(request, times(60, 2_000), layers=3, micro_batches=4):
        waits = derive_waits(ops)
        edges = [(i, j) for i, targets in enumerate(waits) for j in targets]
        for i, j in rng.sample(edges, min(12, len(edges))):
            fewer = [*waits[:i], tuple(k for k in waits[i] if k != j), *waits[i + 1 :]]
            faults = [fault for fault in check(ops, spec, fewer) if "may run before" in fault]
            assert any(f.startswith(f"{ops[i]} ") and f" {ops[j]} " in f for f in faults), (
                f"{ops[i]} need not wait for {ops[j]}: {described(spec)}"
            )
            removed[ops[i].kind + ops[j].kind] += 1
    pairs = {"PB", "SP", "PS", "GS", "GP", "BG", "AN", "AD", "FA", "WA", "DB", "UO", "QU", "UQ"}
    assert pairs <= removed.keys(), pairs - removed.keys()


def test_evaluations_of_random_specs_are_sound(request: pytest.FixtureRequest) -> None:
    from dataclasses import replace

    for spec, _ in specs(request, times(100, 2_000)):
        spec = replace(spec, evaluate=True, rounds=1, saved=frozenset())
        ops = build(spec)
        assert check(ops, spec) == [], described(spec)
        assert {op.kind for op in ops} <= set("UQFE")
        assert {op.unit for op in ops if op.kind == "U"} == spec.uploaded


def test_a_resident_crosses_no_bus_and_is_updated_where_it_lives(request: pytest.FixtureRequest) -> None:
    """Of a split unit the frozen part does, and its updates never wait for that, nor that for them."""
    split = 0
    for spec, ops in specs(request, times(100, 1_000)):
        waits = derive_waits(ops)
        for unit in spec.resident:
            kinds = Counter(op.kind for op in ops if op.unit == unit)
            assert bool(kinds["U"]) == (unit in spec.split) and not kinds["O"]
            assert kinds["A"] == (2 if unit in spec.trainable else 0), described(spec)
        for i, targets in enumerate(waits):
            if ops[i].unit in spec.split and ops[i].kind in "UA":
                split += 1
                assert not {ops[j].kind for j in targets} & ({"A", "O"} if ops[i].kind == "U" else {"U"})
    assert split > 100


def test_a_packed_unit_is_unpacked_once_for_each_upload(request: pytest.FixtureRequest) -> None:
    """By the first op that the compute lane runs of its visit; others have neither op nor staging slot."""
    seen = 0
    for spec, ops in specs(request, times(100, 1_000)):
        for unit in spec.uploaded:
            uploads = [op for op in ops if op.kind == "U" and op.unit == unit]
            unpacks = [op for op in ops if op.kind == "Q" and op.unit == unit]
            assert len(unpacks) == (len(uploads) if unit in spec.packed else 0), described(spec)
            assert all((op.staging >= 0) == (unit in spec.packed) for op in uploads)
            seen += len(unpacks)
    assert seen > 100


def test_uploads_of_rounds(request: pytest.FixtureRequest) -> None:
    """At most twice a round, and once fewer between two rounds for what is still in its slot."""
    for spec, _ in specs(request, times(100, 1_000)):
        uploads = Counter(op.unit for op in build(spec) if op.kind == "U")
        assert set(uploads) == spec.uploaded, described(spec)
        if spec.slots > spec.checkpoint_interval:
            assert max(uploads.values(), default=0) <= 2 * spec.rounds, described(spec)
