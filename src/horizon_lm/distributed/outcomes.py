"""Work of which every rank learns how it went on all: none goes on alone, none waits for one that failed.

An error that is raised here is raised on all ranks, and of one kind: that of the lowest rank that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from horizon_lm import errors
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import HorizonError, RankError

T = TypeVar("T")


def on_each(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do `work` on every rank. Raises on all ranks the error of the lowest one that failed. Collective."""
    return in_turns(ranks, work, turns=1)


def in_turns(ranks: Ranks, work: Callable[[], T], turns: int | None = None) -> T:
    """Do `work` on the ranks of each node one after another, as `on_each`: for work that takes much memory.

    turns: groups of ranks that work at the same time; by default one rank of each node. `work` must not use
    the ranks.
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
        settle(ranks, error, ranks.exchange(packed(error)))
    return found[0]


def settle(ranks: Ranks, own: Exception | None, told: list[Any]) -> None:
    """Raise the first error that ranks have told, if any. own: this rank's; told: of each rank, packed."""
    failed = next((rank for rank, values in enumerate(told) if values is not None), None)
    if failed is None:
        return
    if own is not None and told[ranks.rank] == told[failed]:
        raise own
    raise unpacked(told[failed], failed)


def packed(error: Exception | None) -> dict[str, Any] | None:
    """Return an error that is about to be told as JSON-ready values; None for none."""
    if error is None:
        return None
    if not isinstance(error, HorizonError):
        return {"kind": "", "message": f"{type(error).__name__}: {error}", "hint": None, "exit_code": 1}
    error.is_shared = True
    kind = next(cls.__name__ for cls in type(error).__mro__ if hasattr(errors, cls.__name__))
    code = error.exit_code
    return {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": code}


def unpacked(values: dict[str, Any], rank: int) -> HorizonError:
    """Return the error of another rank, of its kind and with its exit code."""
    message, kind = f"rank {rank}: {values['message']}", getattr(errors, values["kind"] or "RankError")
    error: HorizonError = kind(values["message"] if rank == 0 and values["kind"] else message, values["hint"])
    if isinstance(error, RankError):
        error.ranks = (rank,)
    error.exit_code = values["exit_code"]
    error.is_shared = True
    return error
