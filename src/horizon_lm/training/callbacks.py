"""Callbacks: your functions, which a run calls and which may stop it.

    class Watch:
        def on_evaluate(self, state, control):
            if state.evaluation["eval_loss"] < 2.0:
                control.should_training_stop = True

    hz.train(config, callbacks=[Watch()])

Names and `control` follow transformers' TrainerCallback. Missing methods are not called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.errors import CallbackError, ConfigError
from horizon_lm.report.metrics import Metrics
from horizon_lm.report.records import Evaluation, StepRecord

EVENTS = ("on_step_end", "on_log", "on_evaluate", "on_save")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class CallbackState:
    """Progress of the run, read-only.

    Attributes:
        step: optimizer steps done, of num_steps.
        num_steps: steps of the whole run.
        epoch: passes over the data.
        metrics: the latest line of metrics.jsonl (`loss`, `learning_rate`, ...), empty before the first.
        evaluation: its latest line of an evaluation (`eval_loss`, ...), empty before the first.
        checkpoint: the latest one saved.
    """

    step: int
    num_steps: int
    epoch: float = 0.0
    metrics: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    evaluation: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    checkpoint: Path | None = None


@dataclass(slots=True)
class CallbackControl:
    """What a callback may ask of the run.

    Attributes:
        should_training_stop: set it to True to end the run after this step, as a finished one ends.
    """

    should_training_stop: bool = False


class Callbacks:
    """The callbacks of a run.

    stopped_by: who asked for the end of the run, if anybody. error: what a callback raised; no other is
    called after it, and the current step is finished first.
    """

    def __init__(self, callbacks: Sequence[object], state: CallbackState) -> None:
        self._callbacks, self.state = tuple(callbacks), state
        self.stopped_by: str | None = None
        self.error: CallbackError | None = None
        self._saved: list[Path] = []

    @property
    def are_any(self) -> bool:
        return bool(self._callbacks)

    def step_ended(self, record: StepRecord, metrics: Metrics | None) -> None:
        """Call on_log if there are metrics, then on_step_end."""
        step = record.step if record.rolled_back_to is None else record.rolled_back_to
        self.state = replace(self.state, step=step, epoch=record.epoch)
        if metrics is not None:
            self.logged(metrics)
        self._call("on_step_end")

    def logged(self, metrics: Metrics) -> None:
        self.state = replace(self.state, metrics=_frozen(metrics))
        self._call("on_log")

    def evaluated(self, evaluation: Evaluation) -> None:
        self.state = replace(self.state, evaluation=_frozen(evaluation))
        self._call("on_evaluate")

    def note(self, outcome: Outcome) -> None:
        """Keep a checkpoint for `saved`: this is called in the middle of other work."""
        if outcome.path is not None:
            self._saved.append(outcome.path)

    def saved(self) -> None:
        """Call on_save for each noted checkpoint."""
        while self._saved:
            self.state = replace(self.state, checkpoint=self._saved.pop(0))
            self._call("on_save")

    def fault(self, saved: str | None, run: Path) -> CallbackError:
        """Return the error that ends the run. saved: what there is to resume from, in words."""
        assert self.error is not None
        found = CallbackError(
            f"{self.error.message}; {saved or 'no checkpoint was saved'}",
            hint=f"fix the callback, then resume {run} with resume_from_checkpoint='latest'"
            if saved
            else "fix the callback, then start the run again",
        )
        found.__cause__ = self.error.__cause__
        found.is_shared = True
        return found

    def _call(self, event: str) -> None:
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is None or self.error is not None:
                continue
            control = CallbackControl()
            name = f"{type(callback).__name__}.{event}"
            try:
                method(self.state, control)
            except Exception as error:
                what = f"the callback {name} failed after step {self.state.step}"
                self.error = CallbackError(f"{what}: {type(error).__name__}: {error}")
                self.error.__cause__ = error
            if control.should_training_stop and self.stopped_by is None:
                self.stopped_by = f"the callback {name}"


def check_callbacks(callbacks: object) -> None:
    """Raise ConfigError unless `callbacks` is a list of objects with methods to call."""
    if not isinstance(callbacks, list | tuple):
        raise ConfigError(
            f"callbacks is a {type(callbacks).__name__}, expected a list of objects",
            hint="pass callbacks=[...]",
        )
    for number, callback in enumerate(callbacks):
        name = f"callbacks[{number}] ({getattr(callback, '__name__', type(callback).__name__)})"
        _check(callback, name)


def _check(callback: object, name: str) -> None:
    if inspect.isclass(callback):
        raise ConfigError(f"{name} is a class, expected an object", hint=f"pass {callback.__name__}()")
    if any(c.__module__.startswith("transformers.") for c in type(callback).__mro__):
        raise ConfigError(
            f"{name} is a callback of transformers' Trainer, whose arguments and model do not exist here",
            hint="pass an object with on_step_end(state, control) and so on; for EarlyStoppingCallback set "
            "early_stopping_patience",
        )
    known = ", ".join(EVENTS)
    found = [event for event in dir(callback) if event.startswith("on_")]
    for event in found:
        if event not in EVENTS:
            near = get_close_matches(event, EVENTS, 1, 0.7)
            raise ConfigError(
                f"{name}: {event} would never be called",
                hint=f"did you mean {near[0]}?" if near else f"a callback may have {known}",
            )
        try:
            inspect.signature(getattr(callback, event)).bind(None, None)
        except TypeError as error:
            raise ConfigError(
                f"{name}: {event} cannot be called as {event}(state, control): {error}",
                hint=f"define it as {event}(self, state, control)",
            ) from None
    if not found:
        raise ConfigError(f"{name} has no method of a callback", hint=f"define one of {known}")


def _frozen(line: Metrics | Evaluation) -> Mapping[str, Any]:
    values = {k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in line.to_line().items()}
    return MappingProxyType(values)
