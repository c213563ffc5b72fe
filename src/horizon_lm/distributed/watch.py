"""Watch over ranks: heartbeats, failures told to all, and an end for those that wait for a lost one.

Each rank writes a heartbeat with the op that it is at into the rendezvous store and reads that of the next
rank. A rank whose heartbeat stops is lost. The first failure in the store, of a rank that says so or of one
that is lost, ends all: collectives raise RankError, and a process that is still blocked in one after a while
is ended from here, since a collective cannot be interrupted.

Two threads: one talks to the store, which may never answer; the other one judges.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from horizon_lm.distributed.ranks import Place
from horizon_lm.errors import DoesNotFitError, HorizonError, RankError, StoppedError

_LEFT = "left"
_ENDED = "has ended before others"


class Times(NamedTuple):
    """Seconds. beat: between heartbeats. lost: without a heartbeat until a rank is lost. probe: to tell lost
    ranks from others. patience: from a failure until processes that go on are ended; grace: the same after a
    silence, which has taken its time already."""

    beat: float = 1.0
    lost: float = 18.0
    probe: float = 2.5
    patience: float = 15.0
    grace: float = 3.0


TIMES = Times()


class Failure(NamedTuple):
    """ranks: that failed, by their own account (reason: the error) or another's. op: that they were at.
    is_silent: found by missing heartbeats alone. exit_code: of the error, by their own account; else None."""

    ranks: tuple[int, ...]
    reason: str
    op: str = ""
    is_silent: bool = False
    exit_code: int | None = None

    def __str__(self) -> str:
        if not self.ranks:
            return self.reason
        numbers = ", ".join(map(str, self.ranks))
        who = f"rank {numbers}" if len(self.ranks) == 1 else f"ranks {numbers}"
        return f"{who} {self.reason}" + (f", at {self.op}" if self.op else "")


class _Beat(NamedTuple):
    """The last heartbeat read of a rank: its text, since when, and whether there was another one before."""

    text: str
    since: float = 0.0
    has_changed: bool = False

    @property
    def op(self) -> str:
        return self.text.partition("\n")[2]

    @property
    def has_left(self) -> bool:
        return self.text.partition("\n")[0] == _LEFT


class Watch:
    """The watch of one rank. store: a client of its own, that no other thread uses (torch.distributed.Store).

    is_host: rank 0's process serves the store.
    """

    def __init__(self, store: Any, place: Place, is_host: bool, times: Times = TIMES) -> None:
        self._labels: dict[int, str] = {}  # the last op of each thread
        self._label = ""  # and of all
        self._begun: dict[str, str] = {}  # collectives at work, by channel
        self.failure: Failure | None = None
        self._store, self._rank, self._world = store, place.rank, place.world
        self._is_host, self._times = is_host, times
        self._next = (place.rank + 1) % place.world
        self._beats: dict[int, _Beat] = {}  # since a rank is suspected: only those since then
        self._first = _Beat("")  # of rank 0
        self._count = 0
        self._to_tell: deque[Failure] = deque()
        self._store_error: str | None = None
        self._answered = self._failed_at = time.monotonic()
        self._suspected_at: float | None = None
        self._is_silent = self._has_left = self._is_own = False
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"horizon-{name}", daemon=True)
            for name, work in (("heartbeat", self._talk), ("watch", self._judge))
        ]

    @property
    def op(self) -> str:
        """The collectives at work, or else the last op."""
        return ", ".join(tuple(self._begun.values())) or self._label

    def at(self, op: str) -> None:
        """Name the op of this thread."""
        self._labels[threading.get_ident()] = self._label = op

    @contextmanager
    def collective(self, kind: str, where: str) -> Iterator[str]:
        """Name a collective that is at work; yields the name, with the op of this thread."""
        label = self._labels.get(threading.get_ident(), "")
        name = f"{label} ({kind} on {where})" if label else f"{kind} on {where}"
        if self.failure is not None:
            raise self.error(name)
        self._begun[where] = name
        try:
            yield name
        finally:
            self._begun.pop(where, None)

    @property
    def is_failed(self) -> bool:
        return self.failure is not None

    def start(self) -> None:
        """Begin once all ranks have written their first heartbeat (`greet`)."""
        for thread in self._threads:
            thread.start()

    def greet(self) -> None:
        """Write the first heartbeat."""
        self._store.append("failures", "")
        self._store.set(f"beat/{self._rank}", f"0\n{self.op}")

    def stop(self) -> None:
        """End the watch, as all ranks do together: nobody is watched or ended from here on."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(2)

    def leave(self) -> None:
        """Tell that this rank ends, and stop. If this process serves the store, wait a little for others to
        read it."""
        self._has_left = True
        self.stop()
        others = [f"beat/{rank}" for rank in range(1, self._world)]
        deadline = time.monotonic() + 2.5 * self._times.beat
        with suppress(RuntimeError):
            while self._is_host and self._rank == 0 and time.monotonic() < deadline:
                if all(_Beat(text.decode()).has_left for text in self._store.multi_get(others)):
                    break
                time.sleep(0.02)

    def tell(self, error: BaseException) -> None:
        """Tell all ranks that this one failed. Errors that are raised on all are not told."""
        if isinstance(error, StoppedError) or (isinstance(error, HorizonError) and error.is_shared):
            return
        if self.failure is not None or (isinstance(error, RankError) and error.ranks):
            return
        self._is_own = True
        reason = f"failed: {_message_of(error):.2000}"
        self._fail(Failure((self._rank,), reason, self.op, exit_code=_code_of(error)), tell=True)
        deadline = time.monotonic() + 2
        while self._to_tell and self._store_error is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def cause(self, error: BaseException, at: str) -> RankError:
        """Return the error to raise for one of a collective, `at` which this rank was. Takes seconds if
        another rank was lost without a word."""
        if self._stopping.is_set():
            if self._first_has_left():
                self._fail(Failure((0,), _ENDED, self._first.op), tell=False)
            return self.error(at, error)
        self._suspect()
        deadline = time.monotonic() + self._times.probe + 2 * self._times.beat + 1
        while self.failure is None and self._suspected_at is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.error(at, error)

    def error(self, at: str, error: BaseException | None = None) -> RankError:
        """Return the error to raise at an op after a failure."""
        found = self.failure or Failure((), f"a connection to another rank failed: {error}")
        return _error(found, self._rank, at)

    def _fail(self, failure: Failure, tell: bool) -> None:
        """Take note of the first failure, and tell it to the others."""
        if self.failure is None:
            self._failed_at = time.monotonic()
            self.failure = failure
            if tell:
                self._to_tell.append(failure)
                self._wake.set()

    def _suspect(self, is_silent: bool = False) -> None:
        """Begin to look at the heartbeats of all ranks."""
        if self._suspected_at is None and self.failure is None:
            self._is_silent, self._beats = is_silent, {}
            self._suspected_at = time.monotonic()
            self._wake.set()

    # The thread that talks to the store

    def _talk(self) -> None:
        try:
            while not self._stopping.is_set():
                self._exchange()
                self._answered = time.monotonic()
                if self._first_has_left():
                    self._has_left = True  # tells rank 0 that it was read; the store is gone soon
                    self._stopping.set()
                self._wake.wait(0 if self._stopping.is_set() else self._times.beat)
                self._wake.clear()
            if self._has_left:
                self._exchange()
        except Exception as error:  # whatever it is, the store cannot be used
            self._store_error = f"{type(error).__name__}: {error}"

    def _first_has_left(self) -> bool:
        """Tell whether rank 0 has left, and took the store with it."""
        return self._is_host and self._first.has_left

    def _exchange(self) -> None:
        """Write the heartbeat and failures; read the heartbeats that matter, and the first failure."""
        while self._to_tell:
            self._store.append("failures", json.dumps(self._to_tell[0]) + "\n")
            self._to_tell.popleft()
        self._count += 1
        self._store.set(f"beat/{self._rank}", f"{_LEFT if self._has_left else self._count}\n{self.op:.200}")
        read = range(self._world) if self._suspected_at is not None else {0, self._next}
        watched = [rank for rank in read if rank != self._rank]
        *beats, failures = self._store.multi_get([*(f"beat/{rank}" for rank in watched), "failures"])
        now, known = time.monotonic(), self._beats
        for rank, content in zip(watched, beats, strict=True):
            text, before = content.decode(), known.get(rank)
            if before is None or before.text != text:
                known[rank] = _Beat(text, now, has_changed=before is not None)
        self._first = known.get(0, self._first)
        first = failures.partition(b"\n")[0]
        if first:
            ranks, *others = json.loads(first)
            failure = Failure(tuple(ranks), *others)
            if self.failure is None:
                self._fail(failure, tell=False)
            elif not self._is_own:
                self.failure = failure  # the same one for all

    # The thread that judges

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(0.1):
            now = time.monotonic()
            if (
                now - before > self._times.lost / 4
            ):  # this process was stopped, and has not looked at others since
                self._answered = now
                self._beats = {rank: beat._replace(since=now) for rank, beat in self._beats.items()}
            before = now
            if self.failure is None:
                self._look(now)
            elif now - self._failed_at > self._patience():
                self._end()

    def _look(self, now: float) -> None:
        """Find lost ranks."""
        if self._store_error is not None or now - self._answered > self._times.lost:
            self._store_lost()
        elif self._suspected_at is not None:
            if now - self._suspected_at > self._times.probe and len(self._beats) == self._world - 1:
                self._probed()
        else:
            watched = self._beats.get(self._next)
            if watched is not None and not watched.has_left and now - watched.since > self._times.lost:
                self._suspect(is_silent=True)

    def _probed(self) -> None:
        """Judge the heartbeats of all since a rank was suspected."""
        beats = self._beats
        left = tuple(sorted(rank for rank, beat in beats.items() if beat.has_left))
        lost = tuple(sorted(rank for rank, beat in beats.items() if not (beat.has_changed or beat.has_left)))
        if lost or left:
            ranks = lost or left
            why = f"no sign of life for {self._times.lost:g} s" if self._is_silent else "killed?"
            reason = f"was lost ({why})" if lost else _ENDED
            self._fail(Failure(ranks, reason, beats[ranks[0]].op, self._is_silent), tell=True)
        self._suspected_at = None

    def _store_lost(self) -> None:
        """The store is gone: with rank 0 if its process served it, else with the launcher."""
        is_silent = self._store_error is None
        if self._is_host:
            reason = "was lost (its rendezvous store does not answer)"
            self._fail(Failure((0,), reason, self._first.op, is_silent), tell=False)
        else:
            reason = "the launcher's rendezvous store does not answer"
            self._fail(Failure((), reason, is_silent=is_silent), tell=False)

    def _patience(self) -> float:
        """Seconds from a failure until this process is ended."""
        assert self.failure is not None
        if self._is_own:
            return 2 * self._times.patience  # others have ended by then
        return self._times.grace if self.failure.is_silent else self._times.patience

    def _end(self) -> None:
        """End this process, which is blocked, or did not end by itself."""
        assert self.failure is not None
        error = _error(self.failure, self._rank, self.op)
        out = sys.__stderr__
        with suppress(Exception):
            print(f"rank {self._rank}: error: {error.message}\nhint: {error.hint}", file=out, flush=True)
            sys.stdout.flush()
        os._exit(error.exit_code)


def _error(failure: Failure, rank: int, at: str) -> RankError:
    """Return the error that a rank raises `at` an op because of a failure."""
    here = "" if failure.ranks == (rank,) else f"; rank {rank} was at {at}" if at else ""
    of = f"see the output of rank {failure.ranks[0]}; " if failure.ranks else ""
    error = RankError(f"{failure}{here}", hint=f"{of}resume from the last checkpoint")
    error.ranks, error.op = failure.ranks, failure.op
    error.is_told = failure.exit_code is not None
    error.exit_code = failure.exit_code or error.exit_code
    return error


def _message_of(error: BaseException) -> str:
    """Return an error in words, as commands report it."""
    if isinstance(error, HorizonError):
        return error.message
    if isinstance(error, MemoryError):
        return "the host is out of memory"
    message = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"the device is out of memory: {error}" if _is_of_device(error) else message


def _is_of_device(error: BaseException) -> bool:
    """Whether the device is out of memory. By name: torch need not be imported here."""
    return type(error).__name__ == "OutOfMemoryError"


def _code_of(error: BaseException) -> int:
    """Return the exit code with which an error ends a process."""
    if isinstance(error, HorizonError):
        return error.exit_code
    if isinstance(error, MemoryError) or _is_of_device(error):
        return DoesNotFitError.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
