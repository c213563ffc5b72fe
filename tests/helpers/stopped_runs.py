"""Runs that are stopped at a step, and the one that is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.host_model import HostModel, TrainStepOutput
from horizon_lm.training.train import train
from small_runs import settings, write_text

STEPS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that keeps a checkpoint of each."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(settings(text, run, max_steps=STEPS))
    return run


def stop_at(patch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The process gets a signal in the middle of a step."""
    honest, calls = HostModel.train_step, iter(range(1, 1000))

    def train_step(self: HostModel, *arguments: Any, **others: Any) -> TrainStepOutput:
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return honest(self, *arguments, **others)

    patch.setattr(HostModel, "train_step", train_step)
