"""Metrics to the programs that people watch runs with, when they are installed: `report_to`.

Each gets the settings at the start and a mapping of numbers with each step that is logged, under names that
these programs group by: train/loss, train/grad_norm, eval/loss, ...
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.io import files
from horizon_lm.report.events import Evaluation
from horizon_lm.report.metrics import Metrics
from horizon_lm.words import count

_LEAST_PAUSE_SECONDS, _PAUSE_FACTOR = 10.0, 100.0


class Logger(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, status: str) -> None: ...


@dataclass(frozen=True)
class _Kind:
    package: str
    open: Callable[[TrainConfig, Path], Logger]


class Loggers:
    """All loggers of a run as one; nothing is opened before the first step is logged.

    A logger that fails loses its records, not the run: the failure is reported once, retried after a pause a
    hundred times as long as the attempt, and counted at the end.
    """

    def __init__(self, config: TrainConfig, folder: Path, warn: Callable[[str], None]) -> None:
        """Raises ConfigError for one that is not installed."""
        check_installed(config.report_to)
        self._all = [
            _Guarded(name, partial(_KINDS[name].open, config, folder), warn) for name in config.report_to
        ]

    def step(self, metrics: Metrics) -> None:
        values = {f"train/{name}": value for name, value in asdict(metrics).items() if name != "step"}
        self._log(_numbers(values), metrics.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        values = asdict(evaluation)
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
    """A logger whose exceptions stay its own."""

    def __init__(self, name: str, open_: Callable[[], Logger], warn: Callable[[str], None]) -> None:
        self._name, self._open, self._warn = name, open_, warn
        self._logger: Logger | None = None
        self._given = self._lost = 0
        self._again = -math.inf  # when it is tried again

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
                self._warn(f"{self._name} failed at step {step} ({_in_short(error)}); the run goes on")
            self._lost += 1

    def close(self, status: str) -> None:
        logger, self._logger = self._logger, None
        if self._lost:
            self._warn(f"{self._name} has missed {self._lost:,} of {count(self._given, 'record')}")
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
                f"report_to names {name}, which is not installed", hint=f"pip install {_KINDS[name].package}"
            )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `values`; mappings are opened, as in lanes/compute."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_numbers({f"{name}/{key}": entry for key, entry in value.items()}))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = value
    return found


class _TensorBoard:
    def __init__(self, config: TrainConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = RunFolder(folder).tensorboard
        files.make_folder(place, below=folder)
        self._writer = SummaryWriter(str(place))
        self._writer.add_text("settings", "```yaml\n" + config.to_yaml() + "\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        files.make_folder(RunFolder(folder).wandb, below=folder)  # or it would take a link
        self._run = wandb.init(
            project=config.project, name=config.run_name, config=config.to_dict(), dir=str(folder)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class _Trackio:
    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=config.project, name=config.run_name, config=config.to_dict())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._trackio.finish()


_KINDS: dict[str, _Kind] = {
    "tensorboard": _Kind("tensorboard", _TensorBoard),
    "wandb": _Kind("wandb", _Wandb),
    "trackio": _Kind("trackio", _Trackio),
}
