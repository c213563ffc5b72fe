"""Agreement of the ranks that write a checkpoint: three meetings, in the same order on every rank.

1. begin   rank 0 tells the name of the staging folder, which it has made
2. report  each rank tells which files it has written and synced, or why it has not
3. end     if all have written theirs, rank 0 tells how the manifest and the rename went

A thread of its own attends them. So a rank whose disk fails, or never answers, still takes part, and no rank
waits for a disk but its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

from horizon_lm.distributed.ranks import Channel, Ranks

Values = dict[str, Any]  # JSON-ready; "error": why it failed, or None


class Agreed(NamedTuple):
    """What all ranks know in the end. reports: of each rank. end: None if one of them has an error."""

    reports: list[Values]
    end: Values | None


class Agreement:
    """Of one rank with itself. `ended` is called with the result."""

    def __init__(self, ended: Callable[[Agreed], None]) -> None:
        self._ended = ended
        self._reports: list[Values] = []

    def begin(self, own: Values) -> Values:
        """Return what rank 0 gives; `own` of other ranks is ignored."""
        return own

    def report(self, own: Values) -> list[Values]:
        """Return what each rank gives."""
        self._reports = [own]
        return self._reports

    def end(self, own: Values | None) -> None:
        """Give rank 0's result, if it has come to that. `ended` has been called on return."""
        self._ended(Agreed(self._reports, own))

    def give_up(self, own: Values) -> None:
        """Give this, which has an error, to all meetings to come. One rank has nobody to tell."""


class JointAgreement(Agreement):
    """Of several ranks. `ended` is called on its thread.

    Of several values for one meeting the first counts. The first meeting of a checkpoint comes after the last
    one of the checkpoint before.
    """

    def __init__(self, ranks: Ranks, ended: Callable[[Agreed], None]) -> None:
        super().__init__(ended)
        self._ranks = ranks
        self._given: tuple[Future[Values], ...] = (Future(), Future(), Future())
        self._heard: tuple[Future[Any], ...] = (Future(), Future(), Future())
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def begin(self, own: Values) -> Values:
        found: Values = self._meet(0, own)
        return found

    def report(self, own: Values) -> list[Values]:
        found: list[Values] = self._meet(1, own)
        return found

    def end(self, own: Values | None) -> None:
        self._meet(2, own or {})

    def give_up(self, own: Values) -> None:
        for meeting in range(3):
            self._give(meeting, own)

    def _meet(self, meeting: int, own: Values) -> Any:
        """Raises RankError if another rank is lost."""
        self._give(meeting, own)
        return self._heard[meeting].result()

    def _give(self, meeting: int, own: Values) -> None:
        with suppress(InvalidStateError):
            self._given[meeting].set_result(own)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._attend, name="horizon-checkpoint", daemon=True)
                self._thread.start()

    def _attend(self) -> None:
        ranks, disk = self._ranks, Channel.DISK
        try:
            own = self._given[0].result() if ranks.is_first else {}
            self._heard[0].set_result(ranks.from_first(own, disk))
            reports = ranks.exchange(self._given[1].result(), disk)
            self._heard[1].set_result(reports)
            end = None
            if not any(report["error"] for report in reports):
                own = self._given[2].result() if ranks.is_first else {}
                end = ranks.from_first(own, disk)
            self._ended(Agreed(reports, end))
            self._heard[2].set_result(end)
        except BaseException as error:  # surfaces in the thread that waits
            for heard in self._heard:
                with suppress(InvalidStateError):
                    heard.set_exception(error)
