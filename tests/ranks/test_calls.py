"""Calls of a model on several ranks return what they do on one rank, on every rank, and fail together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import rank_results
from placements import Numbers
from rank_cases import Case
from rank_pool import RankPool

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "case",
    [
        Case("experts, router's loss"),
        Case("large, tied", Numbers("bfloat16"), settings={"update": "deferred"}),
        Case("wide fp32 parameters", Numbers("bfloat16"), settings={"resident": 2, "update": "sync"}),
    ],
    ids=lambda case: case.source,
)
@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_results_are_those_of_one_rank(case: Case, world: str, request: pytest.FixtureRequest) -> None:
    """Losses, log-probabilities and other values, router losses, metrics, gradients, parameters."""
    expected = rank_results.results(case)
    for found in request.getfixturevalue(world).run("rank_results:results_on_ranks", case):
        assert found == expected


EAGER = Case("large, untied", Numbers(clips=False), settings={"update": "eager", "resident": ["layer 1"]})


@pytest.mark.parametrize("case", [Case("untied"), EAGER], ids=["deferred", "eager"])
@pytest.mark.parametrize("kind", rank_results.SPOILT)
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_all_ranks_find_what_is_not_finite(
    case: Case, kind: str, micro_batch: int, two_ranks: RankPool
) -> None:
    """With the same error, and the state that one rank alone is left in."""
    expected = rank_results.spoilt(case, kind, micro_batch)
    assert expected[0] == "NonFiniteError"
    first, second = two_ranks.run("rank_results:spoilt_on_ranks", case, kind, micro_batch)
    assert first == expected
    assert second == [*expected[:-2], {}, expected[-1]]


@pytest.mark.parametrize("update", ["sync", "eager"])
def test_a_check_that_raises_on_one_rank_ends_the_call_on_all(update: str, two_ranks: RankPool) -> None:
    case = Case("untied", Numbers(clips=update != "eager"), settings={"update": update})
    done = int(update == "eager")  # too late for the update
    for failing in range(2):
        results = two_ranks.run("rank_results:checked_on_ranks", case, failing)
        for rank, (error, steps_done, loss) in enumerate(results):
            assert "enough" in error and (rank == failing or f"rank {failing}" in error)
            assert (steps_done, loss) == (done, results[0][2])
    without = two_ranks.run("rank_results:checked_on_ranks", case, -1)
    assert [found[0] for found in without] == [1, 1]


@pytest.mark.parametrize(
    ("what", "named"),
    {
        "settings": "adam_beta1=0.8",
        "data": "micro-batches: 2=",
        "number": "micro-batches",
        "rate": "update: lr=0.02",
        "call": "call: evaluate",
    }.items(),
)
def test_ranks_that_differ_are_named(what: str, named: str, two_ranks: RankPool) -> None:
    eager = Case("untied", Numbers(clips=False), settings={"update": "eager"})
    for case in (Case("untied"), eager) if what == "rate" else (Case("untied"),):
        errors = two_ranks.run("rank_results:differing_on_ranks", case, what)
        assert len(set(errors)) == 1 and "ConfigError: rank 1 differs from rank 0" in errors[0]
        assert named in errors[0]
    assert two_ranks.run("rank_results:differing_on_ranks", Case("untied"), "nothing") == ["", ""]


def test_no_step_follows_one_that_was_cut_short(two_ranks: RankPool) -> None:
    """Ranks may have stopped at different collectives; weights can be read and saved."""
    for first, second, weights in two_ranks.run("rank_results:cut_short_on_ranks", Case("untied")):
        assert first == "ValueError: no loss" and weights == "same"
        assert second.startswith("RankError: an earlier step was cut short")


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize(
    "settings",
    [
        {"update": "deferred"},
        {"update": "eager", "resident": 3},
        {"rounds": 2, "round_sums": "host", "slots": 3},
        {"rounds": 2, "round_sums": "device", "grad_slots": 3, "checkpoint_interval": 2},
    ],
    ids=str,
)
def test_memory_is_predicted_to_the_byte(
    settings: dict[str, Any], reduction: str, four_ranks: RankPool
) -> None:
    numbers = Numbers("bfloat16", clips=settings.get("update") != "eager")
    for source in ("large, tied", "wide fp32 parameters"):
        case = Case(source, numbers, settings={**settings, "reduction": reduction})
        for found in four_ranks.run("rank_results:memory_on_ranks", case):
            whole, _ = found.pop("whole")
            assert all(predicted == allocated for predicted, allocated in found.values()), found
            assert found["host"][0] < 0.6 * whole  # small units are padded


def test_fast_is_close_to_exact_and_repeats_itself(two_ranks: RankPool) -> None:
    """Losses and norms within 1e-5 in fp32; the same bits each time. Another order of addition is visible."""
    cases = [
        Case("large, untied", counts=(4, 3, 1, 5)),
        Case("large, tied", counts=(5, 3), settings={"rounds": 2, "round_sums": "host", "update": "sync"}),
        Case("experts, router's loss", Numbers(clips=False), (3,) * 4, {"update": "eager"}, lanes=7),
    ]
    fast = [replace(case, settings={**case.settings, "reduction": "fast"}) for case in cases]
    exact, once, again = (two_ranks.run("rank_cases:on_ranks", which) for which in (cases, fast, fast))
    for rank in range(2):
        for one, other, third in zip(exact[rank], once[rank], again[rank], strict=True):
            assert other.numbers == pytest.approx(one.numbers, rel=1e-5)
            assert not other.differences(third)
    assert exact[0][0].differences(once[0][0])
