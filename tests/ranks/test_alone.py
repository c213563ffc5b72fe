"""One rank with `reduction: exact` works as one of several: their bits, also for several loss chunks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import horizon_lm as hz
import placements
import rank_results
from horizon_lm.engine import gradient, sharded
from horizon_lm.engine.updates import Updates
from placements import NUMBERS, Numbers, sampled
from rank_cases import SOURCES, Case, alone, model, trained
from rank_pool import RankPool
from sizes import SOAK, times

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {"reduction": "exact"}
KINDS = [(table, dtype) for table in ("large, untied", "large, tied") for dtype in ("float32", "bfloat16")]


def of_chunks(table: str, dtype: str, **settings: Any) -> Case:
    """Steps of four micro-batches, each with a chunk of the loss for every token."""
    return Case(table, Numbers(dtype), (4,) * 3, {"update": "deferred"} | settings, chunk=1)


@pytest.mark.parametrize("world", [2, 4] if SOAK else [2])
def test_several_chunks_have_the_bits_of_several_ranks(world: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])
    cases = [of_chunks(*kind, **EXACT) for kind in KINDS]
    expected = [trained(case) for case in cases]
    for found in pool.run("rank_cases:on_ranks", cases, timeout=300):
        assert [one.differences(other) for one, other in zip(expected, found, strict=True)] == [[]] * 4
    in_fp32 = KINDS.index(("large, tied", "float32"))
    assert trained(of_chunks(*KINDS[in_fp32])).differences(expected[in_fp32])


def sums(case: Case) -> dict[str, torch.Tensor]:
    """Complete gradients of four micro-batches by unit, before they are rounded to the store's dtype."""
    rows = placements.batches(SOURCES[case.source], 50, 32)
    batches = [{name: torch.cat([row[name] for row in rows[m::4]]) for name in rows[0]} for m in range(4)]
    host, found = model(case), dict[int, torch.Tensor]()
    honest = gradient.download_gradient

    def download(run: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        found[target.data_ptr()] = run.clone()
        return honest(run, target)

    with pytest.MonkeyPatch.context() as patch:
        for module in (gradient, sharded):
            patch.setattr(module, "download_gradient", download)
        host.forward_backward(batches)
    units = {unit.name: u for u, unit in enumerate(host.store.units) if u in host.engine.trainable}
    return {name: found[host.store.run("grads", u).data_ptr()] for name, u in units.items()}


@pytest.mark.parametrize(("table", "dtype"), KINDS)
def test_in_place_the_head_has_other_bits(table: str, dtype: str) -> None:
    """The control: of several chunks, the head's gradient is added chunk by chunk there. All others are the
    same, and so is the head's of one chunk. Rounding to bf16 hides most differences."""
    different = {}
    for chunk in (1, 64):
        # Each gradient is downloaded, not accumulated in the store.
        case = replace(of_chunks(table, dtype), lanes=0, chunk=chunk)
        in_place, exact = sums(case), sums(replace(case, settings=EXACT))
        assert in_place.keys() == exact.keys() and len(exact) > 3
        different[chunk] = [name for name, run in in_place.items() if not torch.equal(run, exact[name])]
    assert different == {1: ["head"], 64: []}


@pytest.mark.parametrize("mode", ["sync", "deferred", "eager"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rounds": 4, "round_sums": "add"}, {"resident": 3}, {"checkpoint_interval": 2, "rounds": 2}],
    ids=str,
)
def test_one_chunk_has_the_bits_of_adding_in_place(settings: dict[str, Any], mode: str) -> None:
    for source, dtype in (
        ("large, tied", "bfloat16"),
        ("wide fp32 parameters", "bfloat16"),
        ("untied", "float32"),
    ):
        numbers = Numbers(dtype, clips=mode != "eager")
        case = Case(source, numbers, (4, 1, 3), {"update": mode} | EXACT | settings)
        assert alone(case).differences(trained(case)) == []


def test_no_placement_changes_a_bit(request: pytest.FixtureRequest) -> None:
    """Any settings that change none in place, in program order and in random ones with poisoned buffers."""
    rng = random.Random(request.config.getoption("--hypothesis-seed") if SOAK else 0)
    for i in range(times(12, 300)):
        source, numbers = list(SOURCES)[i % len(SOURCES)], rng.choice(NUMBERS)
        settings = sampled(rng, SOURCES[source], numbers)
        lanes = rng.randrange(1 << 30) if settings.pop("lanes") == "adversarial" else "inline"
        counts = tuple(rng.choice((1, 2, 3, 4, 5)) for _ in range(3))
        case = Case(source, numbers, counts, settings | EXACT, lanes)
        assert alone(case).differences(trained(case)) == [], str(case)


def test_calls_return_what_they_do_in_place() -> None:
    """Evaluations, losses of functions of one's own, gradients."""
    for case in (Case("experts, router's loss"), Case("large, tied", Numbers("bfloat16"))):
        assert rank_results.results(replace(case, settings=EXACT)) == rank_results.results(case)


@pytest.mark.parametrize(
    "settings",
    [
        {"update": "deferred"},
        {"update": "eager", "resident": 3},
        {"rounds": 2, "round_sums": "host", "slots": 3},
        {"rounds": 3, "round_sums": "add"},
        {"rounds": 2, "round_sums": "device", "grad_slots": 3, "checkpoint_interval": 2},
    ],
    ids=str,
)
def test_memory_is_predicted_to_the_byte(settings: dict[str, Any]) -> None:
    """Slots and buffers for shares are real on the CPU too; the store is that of adding in place, but for the
    slabs in which the host would add."""
    numbers = Numbers("bfloat16", clips=settings.get("update") != "eager")
    for source in ("large, tied", "wide fp32 parameters"):
        in_place = Case(source, numbers, settings=settings)
        found = {
            name: rank_results.memory(replace(in_place, settings=settings | more)) for name, more in MODES
        }
        for parts in found.values():
            assert all(predicted == allocated for predicted, allocated in parts.values() if allocated), parts
        assert found["exact"]["slots"] > found["auto"]["slots"] == found["fast"]["slots"]
        fewer = found["auto"]["host"][0] - found["exact"]["host"][0]
        assert (fewer > 0) == (settings.get("round_sums") == "add") and fewer >= 0


MODES = [("exact", EXACT), ("auto", {}), ("fast", {"reduction": "fast"})]


def test_only_exact_leaves_the_steps_in_place() -> None:
    """The others are built and executed as ever: slots are the store's own memory."""
    for name, more in MODES:
        host: hz.HostModel = model(Case("untied", settings=more))
        is_exact = name == "exact"
        spec, updates = host.engine.spec(2), host.engine.ops.updates
        assert (spec.world, spec.reduction) == (1, "exact" if is_exact else "")
        assert (type(updates) is Updates) == (not is_exact)
        kinds = {op.kind for op in host.engine.schedule(spec).ops}
        assert kinds >= set("JTV") if is_exact else not kinds & set("JTV")
        assert bool(host.memory_bytes()["weight_slots"]) == is_exact
