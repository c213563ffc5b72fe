"""Several ranks compute the bits of one: losses, norms, gradients, weights, residuals and moments.

Eight steps with clipping that acts, of models with tied and untied tables, experts, frozen parts, dropout and
parameters in fp32, in each update mode and for numbers of micro-batches that the ranks do not divide.
"""

from __future__ import annotations

import random

import pytest

from placements import CLIPPED_AT, NUMBERS, Numbers, sampled
from rank_cases import SOURCES, STEPS, Case, alone
from rank_pool import RankPool
from sizes import SOAK, times

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (
    *("large, untied", "large, tied", "experts, router's loss", "frozen parts"),
    "learned positions, dropout",
)
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
MODES, COUNTS = ("sync", "deferred", "eager"), (1, 3, 4)


def case(kind: str, dtypes: tuple[str, str], mode: str, count: int) -> Case:
    return Case(kind, Numbers(*dtypes, clips=mode != "eager"), (count,) * STEPS, {"update": mode})


# Each two values of kind, dtypes, mode and number of micro-batches occur together.
PAIRS = [
    case(kind, DTYPES[n], MODES[(k + n) % 3], COUNTS[(k + 2 * n) % 3])
    for k, kind in enumerate(KINDS)
    for n in range(3)
]
ALL = [case(k, d, m, c) for k in SOURCES for d in DTYPES for m in MODES for c in COUNTS]


def check(pool: RankPool, cases: list[Case]) -> None:
    """Fail unless every rank of the pool computes what one alone does."""
    for start in range(0, len(cases), 20):
        some = cases[start : start + 20]
        outcomes = pool.run("rank_cases:on_ranks", some, timeout=900)
        different = {
            f"rank {rank}: {one}": alone(one).differences(found)[:9]
            for rank, founds in enumerate(outcomes)
            for one, found in zip(some, founds, strict=True)
            if alone(one).differences(found)
        }
        assert not different


def test_two_ranks_compute_the_bits_of_one(two_ranks: RankPool) -> None:
    check(two_ranks, ALL if SOAK else PAIRS)


def test_four_ranks_compute_the_bits_of_one(four_ranks: RankPool) -> None:
    check(four_ranks, ALL if SOAK else PAIRS[::2])


def test_clipping_acts() -> None:
    """On every step of some cases, so that norms enter the weights."""
    norms = [alone(one).numbers[1::2] for one in PAIRS if one.numbers.clips and "router" not in one.source]
    assert sum(max(found) > CLIPPED_AT for found in norms) > len(norms) // 2


@pytest.mark.parametrize("world", [2, 4])
def test_no_placement_changes_a_bit(world: int, request: pytest.FixtureRequest) -> None:
    """Residents, rounds and where sums wait, activation policies, spilled inputs, blocks, slots; in program
    order, or in random orders with poisoned buffers, another on each rank."""
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])
    seed = request.config.getoption("--hypothesis-seed") if SOAK else 0
    rng = random.Random(f"{world} {seed}")
    cases = []
    for i in range(times(16 // world, 200)):
        source = rng.choice(list(SOURCES)) if SOAK else list(SOURCES)[(3 * i + world) % len(SOURCES)]
        numbers = rng.choice(NUMBERS)
        settings = sampled(rng, SOURCES[source], numbers)
        lanes = rng.randrange(1 << 30) if settings.pop("lanes") == "adversarial" else "inline"
        counts = tuple(rng.choice((1, 2, 3, 4, 5, 7)) for _ in range(4))
        cases.append(Case(source, numbers, counts, settings, lanes))
    check(pool, cases)


def test_loss_chunks_are_added_within_a_micro_batch_first(two_ranks: RankPool, four_ranks: RankPool) -> None:
    """The known limit: with several chunks per micro-batch, and several micro-batches, one rank alone adds
    the head's gradient chunk by chunk. Several ranks agree with each other."""
    for kind in ("large, untied", "large, tied"):
        one, several = (Case(kind, counts=(count,) * 3, chunk=4) for count in (1, 3))
        check(two_ranks, [one])
        two, four = (pool.run("rank_cases:on_ranks", [several])[0][0] for pool in (two_ranks, four_ranks))
        assert not two.differences(four)
        assert alone(several).differences(two)


# Negative controls: each is wrong in one place only.

WRONG = {
    "parts in reverse order": Case("large, untied", counts=(4, 4)),
    "seeds by position": Case("learned positions, dropout", counts=(2,)),
    "the last of each position left out": Case("large, untied", counts=(3, 3)),
    "squares of ranks added in fp32": Case("large, untied", counts=(2,) * 4),
    "rows added without rounding": Case("large, tied", Numbers("bfloat16"), counts=(2, 2)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_done_wrongly_is_noticed(wrong: str, two_ranks: RankPool) -> None:
    one = WRONG[wrong]
    honest, mistaken = (two_ranks.run("rank_cases:on_ranks", [one], how)[0][0] for how in ("", wrong))
    assert not alone(one).differences(honest)
    assert alone(one).differences(mistaken)
