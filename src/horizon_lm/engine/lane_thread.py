"""A thread that serves many runs: cuDNN plans and OpenMP teams belong to a thread and are costly to make."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from operator import length_hint
from queue import SimpleQueue


class Latch:
    """A `threading.Event` that is set once, for good, by a single C call.

    An asynchronous exception (`PyThreadState_SetAsyncExc`) may be raised between any two bytecodes. In
    `Event.set` it can leave a lock held, for which all other threads then wait.
    """

    __slots__ = ("_lock", "_once")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._once = iter((None,))

    @property
    def is_set(self) -> bool:
        return not length_hint(self._once)

    def set(self) -> None:
        # Only the first caller releases the lock.
        deque(map(self._lock.__exit__, self._once), 0)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Wait; any number of threads may."""
        if not self.is_set:
            with self._lock:  # acquired and released by one bytecode each
                pass

    def wait_for(self, seconds: float) -> bool:
        """Wait at most `seconds`, in only one thread at a time; return whether it is set."""
        if not self.is_set and self._lock.acquire(timeout=seconds):
            self._lock.release()
        return self.is_set


# The work, and the latch to set when it has ended. The work returns whether its thread may be reused.
Task = tuple[Callable[[], bool], Latch]


class LaneThread:
    """A daemon thread that runs tasks in order and keeps no reference to a finished one.

    It ends on request (`end`), after a task that returned False, and after any exception. Since an exception
    may be raised anywhere, the thread need not report its end: it holds a lock while it lives.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._lives = threading.Lock()
        self._has_begun = False
        self._may_go_on = True
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    @property
    def name(self) -> str:
        return self._thread.name

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if the system allows no more threads."""
        self._thread.start()

    def do(self, work: Callable[[], bool], ended: Latch) -> None:
        self._tasks.put((work, ended))

    def end(self) -> None:
        """Let the thread end after its tasks. Safe in finalizers: `SimpleQueue.put` is reentrant."""
        self._tasks.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the thread has ended, at most `seconds`."""
        if self._lives.acquire(timeout=seconds):
            self._lives.release()

    @property
    def is_dead(self) -> bool:
        """Whether the thread has ended. `is_alive` alone does not tell: after an interrupted wait, Python
        3.11 takes a running thread for ended."""
        if self._has_begun:
            return not self._lives.locked()
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def is_usable(self) -> bool:
        """Whether the thread accepts further tasks. Valid only between tasks."""
        return self._thread.ident is not None and self._may_go_on and not self.is_dead

    def _serve(self) -> None:
        with self._lives:
            self._has_begun = True
            while self._may_go_on and (task := self._tasks.get()) is not None:
                work, ended = task
                self._may_go_on = False
                try:
                    self._may_go_on = work()
                finally:
                    ended.set()
                del task, work, ended
