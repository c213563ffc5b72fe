"""Interrupts at chosen moments: a KeyboardInterrupt where CPython would let a signal's handler raise one.

CPython runs the handlers of signals between bytecodes: as a function begins or goes on, after a call, and as
a loop goes round. These moments are counted in the code of this package, so that each can be tried in turn.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import horizon_lm

_PACKAGE = str(Path(horizon_lm.__file__).parent)
_LOOKS = frozenset(
    dis.opmap[name]
    for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")
    if name in dis.opmap
)


@cache
def _handlers(code: CodeType) -> tuple[Any, ...]:
    return tuple(dis._parse_exception_table(code))  # type: ignore[attr-defined]


def _handler(code: CodeType, place: int) -> int | None:
    """Where an exception of the instruction at `place` goes."""
    return next((e.target for e in _handlers(code) if e.start <= place < e.end), None)


class Moments:
    """Counts the moments of a call in the files of the package that `wanted` picks; interrupts at one."""

    def __init__(self, wanted: Callable[[str], bool] = lambda path: True) -> None:
        self.wanted = wanted
        self.count, self.at, self.where = 0, -1, ""
        self._before: dict[int, int] = {}

    def run(self, call: Callable[[], object], at: int = -1) -> bool:
        """Whether the call was interrupted, which happens at moment number `at`."""
        self.count, self.at, self._before = 0, at, {}
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) or not self.wanted(path[len(_PACKAGE) + 1 :]):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._before[id(frame)] = frame.f_lasti
        return self._look

    def _look(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "return":
            self._before.pop(id(frame), None)
        if event != "opcode":
            return self._look
        code, place = frame.f_code, frame.f_lasti
        before = self._before.get(id(frame), -1)
        self._before[id(frame)] = place
        if before < 0 or code.co_code[before] not in _LOOKS:
            return self._look
        if _handler(code, before) != _handler(code, place):
            return self._look  # raised here, it would go another way than raised by the call before
        if frame.f_lineno is None:
            return self._look  # of no line of source, which pytest cannot show
        if self.count == self.at:
            self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            sys.settrace(None)
            raise KeyboardInterrupt
        self.count += 1
        return self._look
