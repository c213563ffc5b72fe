"""The lane that writes host memory to files, in one thread beside all others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from horizon_lm.schedule import Buffer


class DiskLane:
    """One thread for ops that write host memory to files. They outlive the run that they belong to: the
    steps after it go on, and an op that writes what one of them reads waits for it, whichever step it is of.

    patience_seconds: how long such a wait may take, as a disk may hang for ever. After it `give_up` is
    called, and what was queued is forgotten: what it would have written must not be used.
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
        """Do `work` after what was submitted before; until it is done, nothing may write to `reads`. What
        follows a failure that nobody has seen yet is forgotten like what was queued behind it."""
        with self._change:
            if self._failure is not None:
                return
            self._queue.append((reads, work))
            self._see_to_thread()

    def _see_to_thread(self) -> None:
        """Have a thread at work where there is something to do; it ends when there is nothing left. One that
        an interrupt kept from starting, or from being known here, is replaced."""
        if self._queue and (self._thread is None or not self._thread.is_alive()):
            thread = threading.Thread(target=self._work, name="horizon-disk", daemon=True)
            self._thread = thread
            thread.start()

    def settle(self, writes: Iterable[Buffer]) -> None:
        """Wait until nothing that was submitted reads any of `writes`. Raises what went wrong in a work."""
        if not self._queue and self._failure is None:  # nearly always
            return
        wanted = frozenset(writes)
        self._wait(lambda: all(wanted.isdisjoint(reads) for reads, _ in self._queue))

    def drain(self) -> None:
        """Wait until all that was submitted is done. Raises what went wrong in a work."""
        self._wait(lambda: not self._queue)

    def clear(self) -> None:
        """Forget what is queued, wait for what is being done, and drop what went wrong in it: for a step
        that has failed already, and whose checkpoint is given up."""
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
        self._thread = None  # if it ever comes back, it finds that it is no longer the one, and ends

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
