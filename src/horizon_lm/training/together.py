"""What the ranks of a run do together: rank 0 acts and tells, each tells how it went.

Every call is collective, and named: ranks that are at different places of a run fail with the names of both
rather than wait for each other. A rank alone calls nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from horizon_lm.distributed import start
from horizon_lm.distributed.agreement import agree
from horizon_lm.distributed.outcomes import packed, settle
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.errors import HorizonError, RankError
from horizon_lm.io.output import silent_output

T = TypeVar("T")


class Together:
    """The ranks of a run, as one that decides."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks

    @property
    def is_alone(self) -> bool:
        return self.ranks.world == 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.ranks.is_first

    def exchange(self, at: str, value: Any) -> list[Any]:
        """Return the JSON value of each rank. at: the place in the run, equal on all ranks."""
        if self.is_alone:
            return [value]
        self.ranks.at(at)
        found = self.ranks.exchange([at, value])
        odd = next((rank for rank, (place, _) in enumerate(found) if place != found[0][0]), None)
        if odd is not None:
            raise RankError(
                f"rank {odd} is at {found[odd][0]!r}, rank 0 at {found[0][0]!r}",
                hint="report this with the output of `horizon env`",
            )
        return [one for _, one in found]

    def first(self, at: str, work: Callable[[], T]) -> T:
        """Return what `work` returns on rank 0 (JSON-ready), or raise its HorizonError on all ranks."""
        if self.is_alone:
            return work()
        return self._settled(at, work if self.is_first else None)[0]

    def each(self, at: str, work: Callable[[], T]) -> T:
        """Return what `work` returns on this rank; raise the HorizonError of the lowest rank that failed.

        `work` must not use the ranks: those that go on would wait for one that failed.
        """
        if self.is_alone:
            return work()
        own: list[T] = []

        def keep() -> None:
            own.append(work())

        self._settled(at, keep)
        return own[0]

    def alike(self, work: Callable[[], T]) -> T:
        """Return what `work` returns. It may use the ranks: values that are equal on all decide whether it
        fails, so it fails on all of them."""
        try:
            return work()
        except HorizonError as error:
            error.is_shared |= not self.is_alone and not isinstance(error, RankError)
            raise

    def in_order(self, at: str, work: Callable[[], T]) -> T:
        """Like `each`: rank 0 first, then one rank of each other node, then all others.

        For what leaves files that the next ones find.
        """
        if self.is_alone:
            return work()
        local = self.ranks.local_rank
        turn = 0 if self.is_first else 1 if local == 0 else 2
        own: list[T] = []
        for number in range(3):
            self._settled(f"{at} ({number})", (lambda: own.append(work())) if number == turn else None)
        return own[0]

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise ConfigError, with rank and key, unless all ranks have the same JSON-ready values."""
        if not self.is_alone:
            self.exchange(what, None)
            agree(self.ranks, {what: values})

    def _settled(self, at: str, work: Callable[[], Any] | None) -> list[Any]:
        """Do `work` if given; return the results of all ranks (None without), or raise the first error."""
        error: HorizonError | None = None
        result = None
        if work is not None:
            try:
                result = work()
            except HorizonError as found:
                error = found
        told = self.exchange(at, [packed(error), result])
        settle(self.ranks, error, [one for one, _ in told])
        return [one for _, one in told]


E = TypeVar("E", bound=HorizonError)


def shared(error: E) -> E:
    """Mark an error that all ranks raise at the same place of the run."""
    error.is_shared = True
    return error


@contextmanager
def joined(device: str) -> Iterator[Together]:
    """Connect to the other ranks of this run, if there are any, until they leave together.

    device: the setting. Ranks but the first are silent. An error that ends this rank alone ends the others.
    """
    with start.joined(device) as ranks:
        if ranks.world == 1:
            yield Together(ranks)
            return
        try:
            with silent_output(not ranks.is_first):
                yield Together(ranks)
        except HorizonError as error:
            error.is_shared |= isinstance(error, RankError) and not _reports(error, ranks)
            error.is_own = not error.is_shared
            raise


def _reports(error: RankError, ranks: Ranks) -> bool:
    """Tell whether this rank reports the failure of others: the lowest that is left does, unless rank 0 has
    told of it itself."""
    first = next((rank for rank in range(ranks.world) if rank not in error.ranks), 0)
    return ranks.rank == first and not (error.is_told and 0 in error.ranks)
