"""Runs of small data with their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from small_runs import settings, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30 sequences of 16 tokens, so that 4 x 2 a step leave a smaller last step."""
    return write_text(tmp_path_factory.mktemp("data") / "text.txt", sentences=36)


def run_of(text: Path, folder: Path, **changes: Any) -> TrainConfig:
    base = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": -1}
    return settings(text, folder, **{**base, "save_strategy": "no", **changes})


def header_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
