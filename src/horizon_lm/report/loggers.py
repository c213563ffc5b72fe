"""Metrics for experiment trackers: `report_to`.

accelerate's trackers call the libraries. Each gets the settings when the first record is logged, then the
numbers of each record under names that trackers group by: train/loss, train/grad_norm, eval/loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.io import files
from horizon_lm.report.metrics import Metrics
from horizon_lm.report.records import Evaluation
from horizon_lm.words import count

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_LEAST_PAUSE_SECONDS, _PAUSE_FACTOR = 10.0, 100.0


class Logger(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, status: str) -> None: ...


@dataclass(frozen=True)
class _Kind:
    package: str
    open: Callable[[TrainConfig, Path], Logger]


class Loggers:
    """All loggers of a run. None is opened before the first record.

    A failing logger loses records but never ends the run: the first failure is a warning, the next attempt
    waits 100 times as long as the failed one took, and a warning at the end counts the lost records.
    """

    def __init__(self, config: TrainConfig, folder: Path, warn: Callable[[str], None]) -> None:
        """Raises ConfigError if one is not installed."""
        check_installed(config.report_to)
        self._all = [
            _Guarded(name, partial(_KINDS[name].open, config, folder), warn) for name in config.report_to
        ]

    def step(self, metrics: Metrics) -> None:
        values = {f"train/{name}": value for name, value in metrics.to_line().items() if name != "step"}
        self._log(_numbers(values), metrics.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        values = evaluation.to_line()
        step = values.pop("step")
        self._log(_numbers({name.replace("eval_", "eval/"): value for name, value in values.items()}), step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for logger in self._all:
            logger.log(values, step)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in self._all:
            logger.close("finished" if kind is None else "failed")


class _Guarded:
    """A logger whose exceptions become warnings."""

    def __init__(self, name: str, open_: Callable[[], Logger], warn: Callable[[str], None]) -> None:
        self._name, self._open, self._warn = name, open_, warn
        self._logger: Logger | None = None
        self._given = self._lost = 0
        self._again = -math.inf  # earliest time of the next attempt

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._given += 1
        began = time.monotonic()
        if began < self._again:
            self._lost += 1
            return
        try:
            if self._logger is None:
                self._logger = self._open()
            self._logger.log(values, step)
        except Exception as error:
            now = time.monotonic()
            self._again = now + max(_LEAST_PAUSE_SECONDS, _PAUSE_FACTOR * (now - began))
            if not self._lost:
                self._warn(f"{self._name} failed at step {step} ({_in_short(error)}); the run continues")
            self._lost += 1

    def close(self, status: str) -> None:
        logger, self._logger = self._logger, None
        if self._lost:
            self._warn(f"{self._name} missed {self._lost:,} of {count(self._given, 'record')}")
        self._given = self._lost = 0
        if logger is None:
            return
        try:
            logger.close(status)
        except Exception as error:
            self._warn(f"{self._name} could not be closed ({_in_short(error)})")


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")


def check_installed(names: Sequence[str]) -> None:
    for name in names:
        if find_spec(_KINDS[name].package) is None:
            raise ConfigError(
                f"report_to: {name} is not installed", hint=f"pip install {_KINDS[name].package}"
            )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among `values`; nested mappings become names such as lanes/compute."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_numbers({f"{name}/{key}": entry for key, entry in value.items()}))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = value
    return found


class _Tracker:
    """A `Logger` over a tracker of accelerate. fail: ends a run that failed; None to end it as any other."""

    def __init__(self, tracker: GeneralTracker, fail: Callable[[], None] | None = None) -> None:
        self._tracker, self._fail = tracker, fail

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self, status: str) -> None:
        if status != "finished" and self._fail is not None:
            self._fail()
        else:
            self._tracker.finish()


def _start(
    kind: str, project: str, /, *, settings: Mapping[str, Any] | None = None, **options: Any
) -> GeneralTracker:
    """Start a tracker of accelerate. settings: stored as the run's parameters."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers read it on every call, and raise without it
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[kind](project, **options)
    tracker.start()
    if settings is not None:
        try:
            tracker.store_init_configuration(dict(settings))
        except Exception:
            tracker.finish()  # a run left active would make the next attempt fail
            raise
    return tracker


def _tensorboard(config: TrainConfig, folder: Path) -> Logger:
    place = RunFolder(folder).tensorboard
    files.make_folder(place, below=folder)
    tracker = _start("tensorboard", place.name, logging_dir=str(folder))
    # As text: accelerate would store parameters in a folder that it makes without looking for links.
    tracker.log({"settings": "```yaml\n" + config.to_yaml() + "\n```"})
    return _Tracker(tracker)


def _wandb(config: TrainConfig, folder: Path) -> Logger:
    files.make_folder(RunFolder(folder).wandb, below=folder)  # or wandb would follow a link
    options: dict[str, Any] = {"name": config.run_name, "config": config.to_dict(), "dir": str(folder)}
    tracker = _start("wandb", config.project, **options)
    return _Tracker(tracker, fail=lambda: tracker.tracker.finish(exit_code=1))


def _trackio(config: TrainConfig, folder: Path) -> Logger:
    return _Tracker(_start("trackio", config.project, name=config.run_name, config=config.to_dict()))


def _mlflow(config: TrainConfig, folder: Path) -> Logger:
    import mlflow

    tracker = _start("mlflow", config.project, run_name=config.run_name, settings=config.to_dict())
    return _Tracker(tracker, fail=lambda: mlflow.end_run("FAILED"))


def _comet(config: TrainConfig, folder: Path) -> Logger:
    tracker = _start("comet_ml", config.project, settings=config.to_dict())
    if config.run_name:
        tracker.tracker.set_name(config.run_name)
    return _Tracker(tracker)


_KINDS: dict[str, _Kind] = {
    "tensorboard": _Kind("tensorboard", _tensorboard),
    "wandb": _Kind("wandb", _wandb),
    "trackio": _Kind("trackio", _trackio),
    "mlflow": _Kind("mlflow", _mlflow),
    "comet_ml": _Kind("comet_ml", _comet),
}
