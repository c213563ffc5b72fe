"""Ranks of a run decide together, or fail together."""

from __future__ import annotations

import math
import signal

import pytest

from horizon_lm.errors import ConfigError, DataError
from horizon_lm.training.together import Together
from rank_pool import RankPool

CASES = "together_cases"
NOTHING = {"has_ended": False, "is_time": False, "is_deadline_near": False}


def test_rank_0_acts_and_tells(two_ranks: RankPool) -> None:
    assert two_ranks.run(f"{CASES}:first_works") == [[0, math.inf]] * 2


def test_an_error_on_rank_0_is_raised_on_all(two_ranks: RankPool) -> None:
    expected = ("ConfigError", "no such folder", "make it", 2, True)
    assert two_ranks.run(f"{CASES}:first_fails") == [expected] * 2


def test_each_rank_keeps_its_own_result(two_ranks: RankPool) -> None:
    assert two_ranks.run(f"{CASES}:each", []) == [0, 10]


@pytest.mark.parametrize(
    ("failing", "messages"),
    [([1], ["rank 1: row 1", "row 1"]), ([0], ["row 0"] * 2), ([0, 1], ["row 0"] * 2)],
)
def test_an_error_on_one_rank_is_raised_on_all(
    two_ranks: RankPool, failing: list[int], messages: list[str]
) -> None:
    """The lowest rank's, of its kind and with its exit code; the failing rank has its own message."""
    found = two_ranks.run(f"{CASES}:each", failing)
    assert found == [("DataError", message, None, 4, True) for message in messages]


def test_rank_0_fills_the_cache_before_others_look(two_ranks: RankPool) -> None:
    (_, ended), (began, _) = two_ranks.run(f"{CASES}:in_order")
    assert ended <= began


def test_equal_values_agree(two_ranks: RankPool) -> None:
    values = {"a": math.nan, "b": [1, {"c": None}]}
    assert two_ranks.run(f"{CASES}:agree", values) == [None, None]


def test_a_difference_is_named_with_its_rank(two_ranks: RankPool) -> None:
    mine, other = {"lr": 1e-5, "seed": 1}, {"lr": 1e-4, "seed": 1}
    found = two_ranks.run_each(f"{CASES}:agree", [(mine,), (other,)])
    message = "rank 1 differs from rank 0 in settings: lr=0.0001 instead of lr=1e-05"
    assert [one[:2] for one in found] == [("ConfigError", message)] * 2


def test_ranks_at_different_places_fail_and_do_not_wait(two_ranks: RankPool) -> None:
    found = two_ranks.run(f"{CASES}:at_different_places")
    assert [one[:2] for one in found] == [("RankError", "rank 1 is at 'step 5', rank 0 at 'step 4'")] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(two_ranks: RankPool, rank: int) -> None:
    given: list[tuple[int | None, dict[str, bool]]] = [(None, NOTHING), (None, NOTHING)]
    given[rank] = (signal.SIGINT, NOTHING)
    for stop, _, by_rank, later in two_ranks.run_each(f"{CASES}:meeting", given):
        assert stop == (signal.SIGINT, 130)
        assert by_rank == [{"rank": 0}, {"rank": 1}]
        assert later == signal.SIGHUP


def test_without_a_signal_no_rank_stops(two_ranks: RankPool) -> None:
    for stop, *_ in two_ranks.run(f"{CASES}:meeting", None, NOTHING):
        assert stop == (None, 75)


def test_the_clock_of_rank_0_counts_and_saves_end_on_all(two_ranks: RankPool) -> None:
    early = {"has_ended": True, "is_time": True, "is_deadline_near": True}
    late = dict.fromkeys(early, False)
    for given, expected in (
        ([early, late], {**early, "has_ended": False}),
        ([late, early], late),
        ([early, early], early),
    ):
        found = two_ranks.run_each(f"{CASES}:meeting", [(None, due) for due in given])
        assert [due for _, due, *_ in found] == [expected] * 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", (None, None)),
        ("stops", ("the callback Stops.on_step_end", None)),
        ("fails", (None, "the callback Fails.on_step_end failed after step 3: KeyError: 'a'")),
    ],
)
def test_callbacks_run_on_rank_0_and_count_on_all(
    two_ranks: RankPool, kind: str, expected: tuple[str | None, str | None]
) -> None:
    assert two_ranks.run(f"{CASES}:callbacks", kind) == [expected] * 2


def test_a_rank_alone_calls_nothing() -> None:
    class Untouchable:
        world, rank, is_first = 1, 0, True

    together = Together(Untouchable())  # type: ignore[arg-type]
    assert together.first("a", lambda: 3) == 3
    assert together.each("a", lambda: 4) == together.in_order("a", lambda: 4) == 4
    assert together.exchange("a", 5) == [5]
    together.agree("a", {"b": 1})
    for call in (together.first, together.each, together.in_order):
        with pytest.raises(DataError) as caught:
            call("a", lambda: (_ for _ in ()).throw(DataError("row 1")))
        assert not caught.value.is_shared
    assert not ConfigError("a").is_shared
