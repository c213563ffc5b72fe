"""Work of which every rank learns how it went on all: none goes on alone, none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import RankError

T = TypeVar("T")


def on_each(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do `work` on every rank. Raises its error where it failed, RankError on the others. Collective."""
    return in_turns(ranks, work, turns=1)


def in_turns(ranks: Ranks, work: Callable[[], T], turns: int | None = None) -> T:
    """Do `work` on the ranks of each node one after another, as `on_each`: for work that takes much memory.

    turns: groups of ranks that work at the same time; by default one rank of each node. In several turns `work`
    must not use the ranks.
    """
    if ranks.world == 1:
        return work()
    if turns is None:
        turns = max(ranks.exchange(ranks.local_world))
    found: list[T] = []
    for turn in range(turns):
        error: Exception | None = None
        if turn == ranks.local_rank % turns:
            try:
                found.append(work())
            except Exception as raised:
                error = raised
        told = ranks.exchange(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next((rank for rank, text in enumerate(told) if text is not None), None)
        if failed is not None:
            raise RankError(f"rank {failed} failed: {told[failed]}", hint=f"see the output of rank {failed}")
    return found[0]
