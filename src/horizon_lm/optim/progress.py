"""How far the update of a unit has come, however it is interrupted.

The work and its entry are one act. Python raises what comes from outside (a KeyboardInterrupt of a signal
handler, `PyThreadState_SetAsyncExc`) between two bytecodes, so also after a call of the kernel and before a
statement that would note it. Therefore

    the kernel      is called by `list.extend`, which files what it returns: one C call in all
    the reference   computes copies; a log then holds what to copy back, and copying twice does no harm
    a device        marks in its memory what each program of a launch did, and launching twice does no harm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Copies = list[tuple[torch.Tensor, torch.Tensor]]  # target, value


@dataclass
class Progress:
    """pieces: into which the update is cut, in a fixed order; known once it has begun. ended: the status of
    each piece that is made. log: a piece that is computed, but perhaps not copied to its place. on_device: a
    piece that is launched, but perhaps not entered in `ended`, and the marks of its programs."""

    pieces: int = 1
    ended: list[int] = field(default_factory=list)
    log: tuple[int, Copies] | None = None
    on_device: tuple[int, torch.Tensor] | None = None

    @property
    def has_begun(self) -> bool:
        return bool(self.ended) or self.log is not None or self.on_device is not None

    @property
    def is_done(self) -> bool:
        return len(self.ended) >= self.pieces

    def call(self, function: Callable[..., int], argument: object) -> int:
        """Make a piece by one function of C, which is called and noted without a bytecode in between."""
        self.ended.extend(map(function, (argument,)))
        return self.ended[-1]

    def copy(self, copies: Copies) -> None:
        """Make a piece by copying values to their targets, which nothing else writes to meanwhile."""
        self.log = len(self.ended), copies
        self.end_copies()

    def end_copies(self) -> None:
        """Make the piece in the log, whether or not that was begun or even ended before."""
        if self.log is None:
            return
        number, copies = self.log
        if number == len(self.ended):
            for target, value in copies:
                target.copy_(value)
            self.ended.append(0)
        self.log = None

    def marks(self, count: int, device: torch.device) -> torch.Tensor:
        """int32 [count] for the programs that make the piece: 0, and 1 where one has ended."""
        if self.on_device is None or self.on_device[0] != len(self.ended):
            self.on_device = len(self.ended), torch.zeros(count, dtype=torch.int32, device=device)
        return self.on_device[1]
