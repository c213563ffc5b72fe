"""A text, and a run that was trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from horizon_lm.training.train import train
from small_runs import settings, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(text, run, max_steps=2))
    return run
