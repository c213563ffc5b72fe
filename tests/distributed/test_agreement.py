"""Agreement names the ranks that differ, in what, and both values, with the same error on all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from horizon_lm.distributed.agreement import agree, difference
from horizon_lm.distributed.ranks import ALONE
from rank_pool import RankPool

VALUES = {"settings": {"lr": 1e-4, "layers": [1, 2, {"a": None}]}, "data": "5f", "op list": "9a"}


def changed(**changes: Any) -> dict[str, Any]:
    return {**VALUES, **changes}


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ([VALUES, VALUES, VALUES], None),
        ([VALUES, changed(data="60")], "rank 1 differs from rank 0 in data: 60 instead of 5f"),
        ([VALUES, VALUES, changed(data="60")], "rank 2 differs from rank 0 in data: 60 instead of 5f"),
        ([changed(data="60"), VALUES, VALUES], "rank 0 differs from rank 1 in data: 60 instead of 5f"),
        (
            [VALUES, changed(data="60"), VALUES, changed(data="60"), VALUES],
            "ranks 1, 3 differ from rank 0 in data: 60 instead of 5f",
        ),
        (
            [VALUES, changed(settings={"lr": 1e-3, "layers": [1, 2, {"a": None}]})],
            "rank 1 differs from rank 0 in settings: lr=0.001 instead of lr=0.0001",
        ),
        (
            [VALUES, changed(settings={"lr": 1e-4, "layers": [1, 2, {"a": math.nan}]})],
            "rank 1 differs from rank 0 in settings: layers.2.a=NaN instead of layers.2.a=null",
        ),
        (
            [VALUES, changed(settings={"layers": [1, 2, {"a": None}]})],
            "rank 1 differs from rank 0 in settings: lr=(absent) instead of lr=0.0001",
        ),
        ([{"n": 1}, {"n": 1.0}], "rank 1 differs from rank 0 in n: 1.0 instead of 1"),
        ([{"n": math.nan}, {"n": math.nan}], None),
        ([{"x": "a" * 500}, {"x": "b" * 500}], f"in x: {'b' * 60}...{'b' * 37} instead of {'a' * 60}..."),
    ),
)
def test_differences(values: list[dict[str, Any]], message: str | None) -> None:
    found = difference(values)
    assert found == message or (message is not None and found is not None and message in found)


def test_all_ranks_raise_the_same_error(four_ranks: RankPool) -> None:
    assert four_ranks.run("agreement_cases:how", VALUES) == [None] * 4
    given = [(VALUES,), (VALUES,), (changed(settings={"lr": 0.5}),), (VALUES,)]
    found = four_ranks.run_each("agreement_cases:how", given)
    assert found == [found[0]] * 4
    kind, message, is_shared = found[0]
    assert (kind, is_shared) == ("ConfigError", True)
    assert message == "rank 2 differs from rank 0 in settings: layers=(absent) instead of layers=" + (
        '[1, 2, {"a": null}]'
    )
    assert four_ranks.run("agreement_cases:how", VALUES) == [None] * 4  # nothing is left over


def test_values_that_are_no_json(two_ranks: RankPool) -> None:
    """Their text is compared."""
    assert two_ranks.run("agreement_cases:how", {"path": {1, 2}}) == [None] * 2


def test_a_rank_alone_agrees() -> None:
    agree(ALONE, {"anything": object()})
