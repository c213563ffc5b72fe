"""The disk lane: writes host memory to files, in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from horizon_lm.schedule import Buffer


class Saving(Protocol):
    """A checkpoint being written. Methods run on the disk lane; `abandon` on any thread.

    Disk errors are kept for the caller who asked for the checkpoint; they never fail a step.
    """

    def write_unit(self, unit: int) -> None:
        """Write a unit; its memory may change once this returns."""

    def finish(self) -> None:
        """Complete the checkpoint after its last unit, or remove an abandoned one."""

    def abandon(self) -> None:
        """Write nothing more: this will not become a checkpoint."""


class DiskLane:
    """One thread for ops that write host memory to files.

    These ops may outlive their step. An op waits before overwriting a buffer that any pending write reads.

    patience_seconds: limit of such a wait, since a disk may hang indefinitely. After it `give_up` is called
    and the queue is dropped: what it would have written must not be used.
    """

    def __init__(self, patience_seconds: float = 600.0) -> None:
        self.patience_seconds = patience_seconds
        self.give_up: Callable[[], None] = lambda: None
        self._change = threading.Condition()
        self._queue: deque[tuple[frozenset[Buffer], Callable[[], None]]] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def submit(self, reads: frozenset[Buffer], work: Callable[[], None]) -> None:
        """Queue `work`; until it is done, nothing may write to `reads`.

        Work submitted after a failure that was not raised yet is dropped, as was the queue behind it.
        """
        with self._change:
            if self._failure is not None:
                return
            self._queue.append((reads, work))
            self._see_to_thread()

    def _see_to_thread(self) -> None:
        """Start a thread if there is work; it ends when there is none left.

        A thread that an interrupt kept from starting, or from being stored here, is replaced.
        """
        if self._queue and (self._thread is None or not self._thread.is_alive()):
            thread = threading.Thread(target=self._work, name="horizon-disk", daemon=True)
            self._thread = thread
            thread.start()

    def settle(self, writes: Iterable[Buffer]) -> None:
        """Wait until no pending work reads any of `writes`. Raises what failed in earlier work."""
        if not self._queue and self._failure is None:  # nearly always
            return
        wanted = frozenset(writes)
        self._wait(lambda: all(wanted.isdisjoint(reads) for reads, _ in self._queue))

    def drain(self) -> None:
        """Wait until all work is done. Raises what failed in it."""
        self._wait(lambda: not self._queue)

    def clear(self) -> None:
        """Drop the queue of an abandoned checkpoint; wait for the running work, ignoring its failure."""
        with self._change:
            while len(self._queue) > 1:
                self._queue.pop()
            self._see_to_thread()
            self._change.wait_for(lambda: not self._queue, self.patience_seconds)
            self._forget()
            self._failure = None

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._change:
            self._see_to_thread()
            in_time = self._change.wait_for(
                lambda: done() or self._failure is not None, self.patience_seconds
            )
            if not in_time:
                self._forget()
            failure, self._failure = self._failure, None
        if not in_time:
            self.give_up()
        if failure is not None:
            raise failure

    def _forget(self) -> None:
        self._queue.clear()
        self._thread = None  # if it ever returns, it finds that it was replaced, and ends

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._change:
                if self._thread is not me:
                    return
                if not self._queue:
                    self._thread = None
                    self._change.notify_all()
                    return
                _, work = self._queue[0]
            try:
                work()
            except BaseException as error:  # surfaces in the thread that waits next
                with self._change:
                    if self._thread is me:
                        self._failure = error
                        self._forget()
                        self._change.notify_all()
                return
            with self._change:
                if self._thread is not me:
                    return
                self._queue.popleft()
                self._change.notify_all()
