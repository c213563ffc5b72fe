"""Standard streams that may fail: the reader of a pipe exits, a disk fills up, a stream is closed.

Commands that print their result (`plan`, `eval`) end if it cannot be written. Those that write it to disk
(`train`, `export`) continue, and report on the stream that works. All output is sanitised (see `text`).
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from horizon_lm.errors import OutputLostError
from horizon_lm.text import shown, shown_with_bars

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = "it is closed"
_DRAWN = "\x1b"  # from a display redrawn in place, on a terminal that is gone


class Output:
    """A text stream whose writes do not fail unexpectedly.

    stream: None in a process started without it. fault: why the latest text was not written, None if it was.
    Text that cannot be written raises OutputLostError if it `is_result`; else it goes to `instead` (after a
    broken pipe only with `after_pipe`) or is dropped. Characters that the encoding lacks become `?`. fit:
    sanitises text for an encoding.
    """

    def __init__(
        self,
        stream: TextIO | None,
        name: str,
        *,
        is_result: bool = False,
        fit: Callable[[str, str], str] | None = None,
    ) -> None:
        self.stream, self.name, self.is_result, self._fit = stream, name, is_result, fit
        self.instead: Output | None = None
        self.after_pipe = True
        self.fault: str | None = None
        self._is_said = False

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self.write_raw(text if self._fit is None else self._fit(text, self.encoding))
        return len(text)

    def write_raw(self, text: str) -> int:
        """Write text that is already sanitised."""
        self._answer(self._attempt(text, flush=not self.is_result), text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._answer(self._attempt("", flush=True), "")

    def _attempt(self, text: str, *, flush: bool) -> Exception | None:
        """Write text; return the error if the stream fails."""
        if self.stream is None:
            return OSError(errno.EBADF, _CLOSED) if text else None
        try:
            try:
                # Once its thread has ended, a stream of Jupyter's kernel may only be flushed.
                if text or not hasattr(self.stream, "pub_thread"):
                    self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
            if flush:
                self.stream.flush()
        except (OSError, ValueError) as error:
            return error
        return None

    def _answer(self, error: Exception | None, text: str) -> None:
        if error is None:
            self.fault = None
            return
        self.fault = getattr(error, "strerror", None) or _CLOSED
        if self.is_result:
            raise _lost(self.name, self.fault, error)
        has_seen_enough = isinstance(error, BrokenPipeError) and not self.after_pipe
        if self.instead is None or not text or has_seen_enough or _DRAWN in text:
            return
        if not self._is_said:
            self._is_said = True
            text = f"warning: {self.name}: {self.fault}; the rest is printed here\n{text}"
        self.instead._attempt(text, flush=True)

    def settle(self) -> None:
        """Flush or discard now: at exit Python would print an exception and change the exit code."""
        if self.stream is None or self._attempt("", flush=True) is None:
            return
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            self.stream.flush()

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Raw:
    """A view of an `Output` that writes text unchanged."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.write = output.write_raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def raw_stream(stream: TextIO) -> TextIO:
    """Return the stream for a display that moves the cursor and prints only sanitised text."""
    return cast(TextIO, _Raw(stream)) if isinstance(stream, Output) else stream


def _lost(name: str, reason: str, error: Exception) -> OutputLostError:
    code = getattr(error, "errno", None)
    if code == errno.EPIPE:
        return OutputLostError(f"{name}: {reason}")
    hint = "free disk space" if code in _NO_ROOM else "add '>/dev/null' to discard the output"
    found = OutputLostError(f"writing to {name} failed: {reason}", hint)
    found.exit_code = 3 if code in _NO_ROOM else 2
    found.is_silent = False
    return found


@contextmanager
def command_output() -> Iterator[None]:
    """Replace the standard streams for a command that prints its result.

    A failing standard output raises OutputLostError, a failing standard error is ignored. All text is
    sanitised.
    """
    _open_closed()
    out = Output(sys.stdout, "standard output", is_result=True, fit=shown)
    err = Output(sys.stderr, "standard error", fit=shown_with_bars)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.settle()
        err.settle()


@contextmanager
def lasting_output(*, after_pipe: bool = False) -> Iterator[None]:
    """Replace the standard streams for work whose result is on disk: if one fails, the other takes its text.

    after_pipe: also if the reader of a pipe has exited, as `head` does once it has enough.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    out, err = _outlasting(sys.stdout, "standard output"), _outlasting(sys.stderr, "standard error")
    was_result, out.is_result = out.is_result, False
    out.instead, err.instead = err, out
    out.after_pipe = err.after_pipe = after_pipe
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.instead = err.instead = None
        out.is_result = was_result and out.fault is None  # lost text was redirected


@contextmanager
def silent_output(is_silent: bool = True) -> Iterator[None]:
    """Discard what is printed or logged, up to warnings, if `is_silent`: by ranks but the first."""
    if not is_silent:
        yield
        return
    before = logging.root.manager.disable
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null), redirect_stderr(null):
        logging.disable(max(before, logging.WARNING))  # handlers keep the streams that they were made with
        try:
            yield
        finally:
            logging.disable(before)


def _outlasting(stream: TextIO | None, name: str) -> Output:
    return stream if isinstance(stream, Output) else Output(stream, name)


def _open_closed() -> None:
    """Open /dev/null in place of closed standard streams: a file of ours would get their number, and all that
    is printed to it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
