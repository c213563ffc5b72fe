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
    assert set("UFXLRCBPSGDNOAW") == kinds.keys() and min(kinds.values()) > 20, kinds


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
    pairs = {"PB", "SP", "PS", "GS", "GP", "BG", "AN", "AD", "FA", "WA", "DB", "UO"}
    assert pairs <= removed.keys(), pairs - removed.keys()


def test_evaluations_of_random_specs_are_sound(request: pytest.FixtureRequest) -> None:
    from dataclasses import replace

    for spec, _ in specs(request, times(100, 2_000)):
        spec = replace(spec, evaluate=True, rounds=1, saved=frozenset())
        ops = build(spec)
        assert check(ops, spec) == [], described(spec)
        assert {op.kind for op in ops} <= set("UFE")
        assert {op.unit for op in ops if op.kind == "U"} == spec.uploaded


def test_a_resident_crosses_no_bus_and_is_updated_where_it_lives(request: pytest.FixtureRequest) -> None:
    for spec, ops in specs(request, times(100, 1_000)):
        for unit in spec.resident:
            kinds = Counter(op.kind for op in ops if op.unit == unit)
            assert not kinds["U"] and not kinds["O"]
            assert kinds["A"] == (2 if unit in spec.trainable else 0), described(spec)


def test_uploads_of_rounds(request: pytest.FixtureRequest) -> None:
    """At most twice a round, and once fewer between two rounds for what is still in its slot."""
    for spec, _ in specs(request, times(100, 1_000)):
        uploads = Counter(op.unit for op in build(spec) if op.kind == "U")
        assert set(uploads) == spec.uploaded, described(spec)
        if spec.slots > spec.checkpoint_interval:
            assert max(uploads.values(), default=0) <= 2 * spec.rounds, described(spec)
