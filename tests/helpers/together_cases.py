"""What ranks do together (`training.together`, `training.decisions`), in the processes of a `RankPool`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from horizon_lm.errors import ConfigError, DataError, HorizonError
from horizon_lm.training.callbacks import Callbacks, CallbackState
from horizon_lm.training.decisions import Decisions
from horizon_lm.training.save import Due
from horizon_lm.training.signals import StopRequest
from horizon_lm.training.together import Together
from rank_pool import ranks


def _how(work: Callable[[], Any]) -> Any:
    """Return the result, or what was raised."""
    try:
        return work()
    except HorizonError as error:
        return type(error).__name__, error.message, error.hint, error.exit_code, error.is_shared


def _fail(error: HorizonError) -> Any:
    raise error


def first_works() -> Any:
    together = Together(ranks())
    return together.first("a", lambda: [together.ranks.rank, math.inf])


def first_fails() -> Any:
    error = ConfigError("no such folder", hint="make it")
    return _how(lambda: Together(ranks()).first("a", lambda: _fail(error)))


def each(failing: list[int]) -> Any:
    together = Together(ranks())
    own = together.ranks.rank
    return _how(
        lambda: together.each("a", lambda: _fail(DataError(f"row {own}")) if own in failing else own * 10)
    )


def in_order() -> tuple[float, float]:
    def work() -> tuple[float, float]:
        began = time.time()
        time.sleep(0.05)
        return began, time.time()

    return Together(ranks()).in_order("a", work)


def agree(values: dict[str, Any]) -> Any:
    return _how(lambda: Together(ranks()).agree("settings", values))


def at_different_places() -> Any:
    together = Together(ranks())
    return _how(lambda: together.exchange(f"step {together.ranks.rank + 4}", 1))


def meeting(number: int | None, due: dict[str, bool]) -> Any:
    """A step's meeting, in which this rank got a signal or not, and its clock says `due`."""
    together = Together(ranks())
    saver: Any = SimpleNamespace(due=lambda: Due(**due))
    figures: Any = SimpleNamespace(take=lambda: {"rank": together.ranks.rank})
    request = StopRequest(None if number is None else signal.Signals(number))
    told = Decisions(together, request, saver, Callbacks((), CallbackState(0, 9)), figures)
    told.meet("step 1", is_logged=True)
    request.signal = signal.SIGHUP  # after the meeting: no rank goes by it alone
    stop, by_rank = told.stop, list(told.by_rank)
    told.meet("evaluation of step 1")
    return (stop.signal, stop.exit_code), vars(told.due), by_rank, told.stop.signal


class Stops:
    """Rank 0's callback."""

    def on_step_end(self, state: Any, control: Any) -> None:
        control.should_training_stop = True


class Fails:
    def on_step_end(self, state: Any, control: Any) -> None:
        raise KeyError("a")


def callbacks(kind: str) -> Any:
    together = Together(ranks())
    own = {"stops": [Stops()], "fails": [Fails()], "none": []}[kind] if together.is_first else []
    called = Callbacks(own, CallbackState(3, 9))
    told = Decisions(together, StopRequest(), *[SimpleNamespace()] * 1, called, *[SimpleNamespace()] * 1)
    called._call("on_step_end")
    told.tell_callbacks("a")
    return called.stopped_by, called.error and called.error.message
