"""Collectives move each element and value unchanged, and add in the order of ranks."""

from __future__ import annotations

import random

import pytest

from collective_cases import DTYPES
from horizon_lm.distributed.ranks import Channel
from rank_pool import RankPool


@pytest.mark.parametrize("numel", (0, 1, 4096, 70_001))
def test_tensors(two_ranks: RankPool, numel: int) -> None:
    assert two_ranks.run("collective_cases:tensors", numel) == [list(DTYPES)] * 2


def test_tensors_of_four(four_ranks: RankPool) -> None:
    assert four_ranks.run("collective_cases:tensors", 4099) == [list(DTYPES)] * 4


def test_reduction_adds_in_rank_order(two_ranks: RankPool, four_ranks: RankPool) -> None:
    for pool in (two_ranks, four_ranks):
        assert pool.run("collective_cases:reduction", 5000) == pool.run("collective_cases:reduction", 5000)


def test_counters(four_ranks: RankPool) -> None:
    """What leaves a process: 4,000 bytes to three others each; three quarters of 8,000 and 16,000."""
    wanted = [
        (12_000, True, []),
        (6_000, True, []),
        (12_000, True, []),
        (0, False, ["disk"]),
        (0, False, ["main"]),
    ]
    assert four_ranks.run("collective_cases:counters") == [wanted] * 4


@pytest.mark.parametrize("channel", Channel)
def test_values(two_ranks: RankPool, channel: Channel) -> None:
    assert two_ranks.run("collective_cases:values", channel) == [[0], [0]]


def test_values_of_four(four_ranks: RankPool) -> None:
    assert four_ranks.run("collective_cases:values", Channel.MAIN) == [[0]] * 4


def test_sums_are_those_of_one_rank(four_ranks: RankPool) -> None:
    numbers = random.Random(1)
    terms = [[numbers.uniform(0, 10.0 ** numbers.randint(-8, 8)) for _ in range(50)] for _ in range(4)]
    alone = [0.5, 0.0]
    for term in sum(terms, []):
        alone = [alone[0] + term, alone[1] - term]
    assert four_ranks.run("collective_cases:passed_on", terms) == [alone] * 4
    backwards = [0.5, 0.0]
    for term in reversed(sum(terms, [])):
        backwards = [backwards[0] + term, backwards[1] - term]
    assert backwards != alone  # the order matters
