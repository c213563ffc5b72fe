"""Metrics to the programs that people watch runs with, when they are installed: `report_to`.

Each gets the settings at the start and a mapping of numbers with each step that is logged, under names that
these programs group by: train/loss, train/grad_norm, eval/loss, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from .. import files
from ..config import TrainConfig
from ..errors import ConfigError
from .evaluation import Evaluation
from .folder import RunFolder
from .metrics import Metrics


class Logger(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, status: str) -> None: ...


@dataclass(frozen=True)
class _Kind:
    package: str
    open: Callable[[TrainConfig, Path], Logger]


class Loggers:
    """All loggers of a run as one; nothing is opened before the first step is logged."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        """Raises ConfigError for one that is not installed."""
        check_installed(config.report_to)
        self._config, self._folder = config, folder
        self._open: list[Logger] | None = None

    def step(self, metrics: Metrics) -> None:
        values = {f"train/{name}": value for name, value in asdict(metrics).items() if name != "step"}
        self._log(_numbers(values), metrics.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        values = asdict(evaluation)
        step = values.pop("step")
        self._log(_numbers({name.replace("eval_", "eval/"): value for name, value in values.items()}), step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if self._open is None:
            self._open = [_KINDS[name].open(self._config, self._folder) for name in self._config.report_to]
        for logger in self._open:
            logger.log(values, step)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        opened, self._open = self._open or [], None
        for logger in opened:
            logger.close("finished" if kind is None else "failed")


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
