"""Decisions of a step that depend on a clock, a signal or a callback: taken once, and told to all ranks.

A rank alone looks when it needs the answer. Several ranks meet once per step, and again after an evaluation;
in between all of them go by what was told there, so that none saves or stops alone.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from horizon_lm.errors import CallbackError
from horizon_lm.report.by_rank import OwnFigures
from horizon_lm.training.callbacks import Callbacks
from horizon_lm.training.save import Due, Saver
from horizon_lm.training.signals import StopRequest
from horizon_lm.training.together import Together


@dataclass(frozen=True)
class _Told:
    due: Due
    signal: signal.Signals | None


class Decisions:
    """What the ranks of a run decide in a step.

    by_rank: figures of each rank, at a step that is logged.
    """

    def __init__(
        self,
        together: Together,
        request: StopRequest,
        saver: Saver,
        callbacks: Callbacks,
        figures: OwnFigures,
    ) -> None:
        self._together, self._request, self._saver = together, request, saver
        self._callbacks, self._figures = callbacks, figures
        self._has_callbacks = together.first("callbacks", lambda: callbacks.are_any)
        self._told: _Told | None = None
        self.by_rank: Sequence[Mapping[str, Any]] = ()

    @property
    def due(self) -> Due:
        return self._saver.due() if self._told is None else self._told.due

    @property
    def stop(self) -> StopRequest:
        """The signal that all ranks stop for, if any."""
        return self._request if self._told is None else StopRequest(self._told.signal)

    def meet(self, at: str, *, is_logged: bool = False) -> None:
        """Tell all ranks what each has seen. is_logged: the step gets a line of metrics."""
        self.by_rank = ()
        if self._together.is_alone:
            return
        own: dict[str, Any] = {"signal": self._request.signal, **vars(self._saver.due())}
        if is_logged:
            own["figures"] = self._figures.take()
        told = self._together.exchange(at, own)
        if is_logged:
            self.by_rank = [one["figures"] for one in told]
        signals = [signal.Signals(one["signal"]) for one in told if one["signal"] is not None]
        due = Due(all(one["has_ended"] for one in told), told[0]["is_time"], told[0]["is_deadline_near"])
        self._told = _Told(due, signals[0] if signals else None)

    def tell_callbacks(self, at: str) -> None:
        """Tell all ranks what the callbacks, which rank 0 calls, have asked for."""
        if self._together.is_alone or not self._has_callbacks:
            return
        callbacks = self._callbacks
        error = callbacks.error.message if callbacks.error is not None else None
        stopped_by, message = self._together.first(at, lambda: [callbacks.stopped_by, error])
        callbacks.stopped_by = stopped_by
        if message is not None and callbacks.error is None:
            callbacks.error = CallbackError(message, hint="see the output of rank 0")
