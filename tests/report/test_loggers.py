"""Loggers: each tracker library is called as it wants, through accelerate; only finite numbers are logged."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.report import loggers

Call = tuple[Any, ...]


@pytest.fixture
def calls() -> list[Call]:
    return []


def config() -> TrainConfig:
    return TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "d", "run_name": "r"})


def plant(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Make `import name` find a module that stands in for the library."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def recorder(calls: list[Call], name: str) -> Any:
    return lambda *values, **options: calls.append((name, *values, options) if options else (name, *values))


def log_once(name: str, folder: Path, status: str) -> None:
    logger = loggers._KINDS[name].open(config(), folder)
    logger.log({"train/loss": 1.0}, 3)
    logger.close(status)


def test_tensorboard_gets_settings_as_text_and_scalars_by_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Call]
) -> None:
    def open_writer(place: str) -> Any:
        calls.append(("open", place))
        names = ("add_text", "add_scalar", "flush", "close")
        return SimpleNamespace(**{name: recorder(calls, name) for name in names})

    plant(monkeypatch, "torch.utils.tensorboard", SummaryWriter=open_writer)
    monkeypatch.setattr("torch.utils.tensorboard", sys.modules["torch.utils.tensorboard"], raising=False)
    log_once("tensorboard", tmp_path, "finished")
    text = "```yaml\n" + config().to_yaml() + "\n```"
    assert calls == [
        ("open", str(tmp_path / "tensorboard")),
        ("add_text", "settings", text, {"global_step": None}),
        ("flush",),
        ("add_scalar", "train/loss", 1.0, {"global_step": 3}),
        ("flush",),
        ("close",),
    ]
    assert list((tmp_path / "tensorboard").iterdir()) == []  # accelerate's file of parameters is not written


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("status", ["finished", "failed"])
def test_wandb_and_trackio_get_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Call], name: str, status: str
) -> None:
    run = SimpleNamespace(log=recorder(calls, "log"), finish=recorder(calls, "finish"))

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return run

    plant(monkeypatch, name, init=init)
    log_once(name, tmp_path, status)
    options = {"project": "horizon-lm", "name": "r", "config": config().to_dict()}
    if name == "wandb":
        options["dir"] = str(tmp_path)
    end = ("finish", {"exit_code": 1}) if (name, status) == ("wandb", "failed") else ("finish",)
    assert calls == [("init", options), ("log", {"train/loss": 1.0}, {"step": 3}), end]


def mlflow(monkeypatch: pytest.MonkeyPatch, calls: list[Call], log_params: Any) -> None:
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    plant(
        monkeypatch,
        "mlflow",
        search_experiments=lambda filter_string: [],
        create_experiment=lambda name, **options: calls.append(("experiment", name)) or "7",  # type: ignore[func-returns-value]
        start_run=lambda **options: calls.append(("run", options["experiment_id"], options["run_name"])),
        log_params=log_params,
        log_metrics=recorder(calls, "log"),
        end_run=recorder(calls, "end"),
        utils=SimpleNamespace(validation=limits),
    )


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_mlflow_gets_an_experiment_parameters_and_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Call], status: str
) -> None:
    found: dict[str, Any] = {}
    mlflow(monkeypatch, calls, found.update)
    log_once("mlflow", tmp_path, status)
    assert calls[:2] == [("experiment", "horizon-lm"), ("run", "7", "r")]
    assert calls[2] == ("log", {"train/loss": 1.0}, {"step": 3})
    assert calls[3:] == [("end", "FAILED") if status == "failed" else ("end",)]
    assert found == config().to_dict()


def test_a_run_whose_parameters_cannot_be_stored_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Call]
) -> None:
    """MLflow refuses to start a run while one is active, so the next attempt would fail too."""

    def fail(values: Any) -> None:
        raise ConnectionError("no network")

    mlflow(monkeypatch, calls, fail)
    with pytest.raises(ConnectionError):
        loggers._KINDS["mlflow"].open(config(), tmp_path)
    assert calls[-1] == ("end",)


def test_comet_gets_name_parameters_and_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Call]
) -> None:
    names = ("log_parameters", "set_name", "set_step", "log_metric", "end")
    experiment = SimpleNamespace(**{name: recorder(calls, name) for name in names})

    def start(**options: Any) -> Any:
        calls.append(("start", options))
        return experiment

    plant(monkeypatch, "comet_ml", __version__="3.58.0", start=start)
    log_once("comet_ml", tmp_path, "failed")
    assert calls == [
        ("start", {"project_name": "horizon-lm"}),
        ("log_parameters", config().to_dict()),
        ("set_name", "r"),
        ("set_step", 3),
        ("log_metric", "train/loss", 1.0, {"step": 3}),
        ("end",),
    ]


def test_numbers_that_are_not_finite_are_not_logged() -> None:
    values = {"a": 1.0, "b": math.nan, "c": {"d": 2.0, "e": math.inf}, "f": "text"}
    assert loggers._numbers(values) == {"a": 1.0, "c/d": 2.0}
