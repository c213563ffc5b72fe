"""One call of a model at a time, and none from within another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from horizon_lm.engine.engine import Engine
from horizon_lm.errors import ConfigError


class _OneAtATime(Protocol):
    """A HostModel, as far as `in_turn` needs it."""

    engine: Engine
    _turn: threading.RLock


_M = TypeVar("_M", bound=_OneAtATime)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_turn(method: Callable[Concatenate[_M, _P], _R]) -> Callable[Concatenate[_M, _P], _R]:
    """Serialise calls of one HostModel across threads, and reject calls from within a step.

    A call from `check` belongs to the call it is made in. Code inside an op (a loss function, a layer, the
    writing of a unit) may run in another thread, and sees weights and gradients half-way.
    """

    @wraps(method)
    def call(self: _M, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        op = self.engine.op_at_work
        if op is not None:
            raise ConfigError(
                f"HostModel.{method.__name__}() was called in the middle of a step of the same model (in op "
                f"{op})",
                hint="call it between two steps, or in train_step(check=...); a loss_fn has what it needs in "
                "its arguments",
            )
        with self._turn:
            self.engine.come_back()
            return method(self, *args, **kwargs)

    return call
