"""Ready ops in random order, another on each rank, with poisoned buffers: the bits of one rank, no hang."""

from __future__ import annotations

from typing import Any

import pytest

from placements import Numbers
from rank_cases import Case, alone
from rank_pool import RankPool, RankPoolError
from sizes import times

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = times(10, 200)
SOURCES = ("large, tied", "experts, router's loss", "large, untied")
# Each kind of op occurs in one of these.
VARIANTS: list[dict[str, Any]] = [
    {"update": "deferred"},
    {"update": "eager", "resident": 3},
    {"update": "sync", "boundaries": "host", "activations": ["recompute*2", "keep*2"]},
    {"rounds": 2, "round_sums": "host", "boundaries": "host", "boundary_slots": 1},
    {"rounds": 2, "round_sums": "device", "resident": 2, "slots": 3},
    {"update": "eager", "grad_slabs": 1, "grad_slots": 3},
    {"checkpoint_interval": 2, "boundaries": ["host", "device*3"]},
]


def case(seed: int) -> Case:
    settings, source = VARIANTS[seed % len(VARIANTS)], SOURCES[seed % len(SOURCES)]
    numbers = Numbers("bfloat16" if seed % 2 else "float32", clips=settings.get("update") != "eager")
    return Case(source, numbers, (4, 3), settings, lanes=1000 * seed)


@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_random_orders_give_the_bits_of_one_rank(world: str, request: pytest.FixtureRequest) -> None:
    pool = request.getfixturevalue(world)
    for seed in range(ORDERS):
        for rank, (found,) in enumerate(pool.run("rank_cases:on_ranks", [case(seed)], timeout=600)):
            assert not alone(case(seed)).differences(found), f"{case(seed)} on rank {rank}"


def test_missing_waits_are_noticed(two_ranks: RankPool) -> None:
    """Ops that do not wait for collectives find something else in their buffers, or nothing."""
    for seed in range(4):
        try:
            found = two_ranks.run("rank_cases:on_ranks", [case(seed)], "no waits for the network")
        except RankPoolError:
            return
        if any(alone(case(seed)).differences(one) for (one,) in found):
            return
    pytest.fail("no order was noticed")
