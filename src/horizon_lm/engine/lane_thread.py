"""A thread that serves many runs: cuDNN's plans and OpenMP's teams belong to a thread and are costly to make."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

# Work, and what to set when it has ended. The work returns whether its thread may serve again.
Task = tuple[Callable[[], bool], threading.Event]


class LaneThread:
    """A daemon thread that does its tasks in order, and refers to none of them once it is done.

    It ends when told to (`end`), after a task that returned False, and by whatever is raised in it. An
    exception from outside (`PyThreadState_SetAsyncExc`) may strike between any two bytecodes, so the thread
    itself cannot be relied upon to tell of its death: a lock that it holds while it lives tells.
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

    def do(self, work: Callable[[], bool], ended: threading.Event) -> None:
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
        with self._lives:  # taken and released by one bytecode each, whatever strikes
            self._has_begun = True
            while self._may_go_on and (task := self._tasks.get()) is not None:
                work, ended = task
                self._may_go_on = False
                try:
                    self._may_go_on = work()
                finally:
                    ended.set()
                del task, work, ended
