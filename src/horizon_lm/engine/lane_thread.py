"""A thread that serves many runs: cuDNN's plans and OpenMP's teams belong to a thread and are costly."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from operator import length_hint
from queue import SimpleQueue


class Latch:
    """As `threading.Event`, but set once for good, and by single calls of C.

    An exception from outside (`PyThreadState_SetAsyncExc`) may strike between any two bytecodes. In
    `Event.set` it can leave a lock behind that all others then wait for.
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
        # Releases the lock for the first caller alone.
        deque(map(self._lock.__exit__, self._once), 0)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Wait, in any number of threads."""
        if not self.is_set:
            with self._lock:  # taken and released by one bytecode each
                pass

    def wait_for(self, seconds: float) -> bool:
        """Wait no longer than this, in one thread only; return whether it is set."""
        if not self.is_set and self._lock.acquire(timeout=seconds):
            self._lock.release()
        return self.is_set


# Work, and what to set when it has ended. The work returns whether its thread may serve again.
Task = tuple[Callable[[], bool], Latch]


class LaneThread:
    """A daemon thread that does its tasks in order, and refers to none of them once it is done.

    It ends when told to (`end`), after a task that returned False, and by whatever is raised in it. Since
    that may strike anywhere, the thread is not relied upon to tell of its death: a lock that it holds while
    it lives tells.
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
        """Raises RuntimeError if the system has no thread to spare."""
        self._thread.start()

    def do(self, work: Callable[[], bool], ended: Latch) -> None:
        self._tasks.put((work, ended))

    def end(self) -> None:
        """Let the thread end after its tasks. Safe in finalizers: `SimpleQueue.put` may be re-entered."""
        self._tasks.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the thread is gone, but no longer than this."""
        if self._lives.acquire(timeout=seconds):
            self._lives.release()

    @property
    def is_dead(self) -> bool:
        """Whether the thread ended. Not by `is_alive` alone: after an interrupted wait, Python 3.11 takes a
        running thread for ended."""
        if self._has_begun:
            return not self._lives.locked()
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def is_usable(self) -> bool:
        """Whether the thread takes further tasks. To be asked between tasks."""
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
