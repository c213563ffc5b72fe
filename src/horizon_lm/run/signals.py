"""Signals that ask a run to stop: the first lets the step end and be saved, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Schedulers send SIGTERM, some SIGUSR1 some minutes before; people press Ctrl-C.
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED, REQUEUE = 130, 75


@dataclass
class StopRequest:
    """signal: the first that came, None while there is none."""

    signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signal is signal.SIGINT else REQUEUE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)
        if sys.stderr is not None and os.isatty(2):  # somebody watches; a log gets the one line at the end
            os.write(2, b"\nending this step and saving; once more stops at once\n")


@contextmanager
def watched() -> Iterator[StopRequest]:
    """While open, signals are noted instead of ending the process. Only the main thread can do so."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._handle) for number in _WATCHED}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
