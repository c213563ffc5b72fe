"""Signals that stop a run: the first finishes and saves the step, the second stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# Schedulers send SIGTERM, some of them SIGUSR1 minutes before; people press Ctrl-C or close the terminal.
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
INTERRUPTED, REQUEUE = 130, 75


@dataclass
class StopRequest:
    """signal: the first one received, if any."""

    signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signal is signal.SIGINT else REQUEUE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.signal is not None:
            return  # not a second request: the system and the shell both send it
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)
        if sys.stderr is not None and os.isatty(2):  # a person watches; a log gets the one line at the end
            with suppress(OSError):  # the terminal is gone
                os.write(2, b"\nending this step and saving; once more stops at once\n")


@contextmanager
def watched() -> Iterator[StopRequest]:
    """Note signals instead of ending the process; only in the main thread, which alone can handle them."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # nohup ignores SIGHUP, since the run must outlive its terminal.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _WATCHED if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, request._handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
