"""Losses that are not learned from: spikes are skipped, reported, rolled back, or end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import events
from faulty_runs import losses as losses
from faulty_runs import text as text
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, LossSpikeError, NonFiniteError
from horizon_lm.report.metrics import read_steps
from horizon_lm.training.state import LossGuard
from horizon_lm.training.train import train
from small_runs import losses_of, settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

SPIKES = {"loss_spike_window": 10, "loss_spike_sigmas": 8.0, "max_steps": 16, "save_steps": 4}


def test_a_spike_is_skipped_or_reported_or_ends_the_run(
    text: Path, tmp_path: Path, losses: Callable[[dict[int, float]], None]
) -> None:
    losses({12: 99.0, 28: 99.0, 44: 99.0, 60: 99.0})
    train(settings(text, tmp_path / "skip", loss_spike="skip", **SPIKES))
    assert [line["skipped_steps"] for line in read_steps(tmp_path / "skip" / "metrics.jsonl")][-1] == 1
    fault = events(tmp_path / "skip", "fault")
    assert [(f["step"], f["done"]) for f in fault] == [(12, "not updated")]
    assert "far above" in fault[0]["reason"]
    train(settings(text, tmp_path / "warn", loss_spike="warn", **SPIKES))
    fault = events(tmp_path / "warn", "fault")
    assert [(f["step"], f["done"]) for f in fault] == [(12, "learned from")]
    train(settings(text, tmp_path / "ignore", **SPIKES))
    assert events(tmp_path / "ignore", "fault") == []
    with pytest.raises(LossSpikeError, match="step 12: the loss is 99") as caught:
        train(settings(text, tmp_path / "stop", loss_spike="stop", **SPIKES))
    assert caught.value.exit_code == 6
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "stop")[0]] == [8, 4]


@pytest.mark.parametrize(
    ("update", "bad", "policy"),
    [
        ("deferred", 99.0, {"loss_spike": "rollback"}),
        ("eager", 99.0, {"loss_spike": "rollback", "max_grad_norm": None}),
        ("sync", math.nan, {"nonfinite": "rollback"}),
        ("deferred", math.inf, {"nonfinite": "rollback"}),
    ],
)
def test_a_rollback_goes_on_with_the_data_after_the_spike(
    update: str,
    bad: float,
    policy: dict[str, Any],
    text: Path,
    tmp_path: Path,
    losses: Callable[[dict[int, float]], None],
) -> None:
    losses({11: bad})
    config = settings(text, tmp_path / "run", update=update, **{**SPIKES, **policy})
    train(config)
    back = events(tmp_path / "run", "rollback")
    assert [b["step"] for b in back] == [8]
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 17))
    last = json.loads((tmp_path / "run" / "checkpoint-16" / "manifest.json").read_text())["state"]
    rows = last["loader"]["epoch"] * last["loader"]["rows"] + last["loader"]["position"]
    assert rows == 2 * (16 + 3)  # the three steps that were undone took their rows with them
    assert last["loop"]["rollbacks"] == 1 and last["steps_done"] == 16


def test_too_many_rollbacks_end_the_run(
    text: Path, tmp_path: Path, losses: Callable[[dict[int, float]], None]
) -> None:
    losses({call: math.nan for call in range(7, 100)})
    config = settings(
        text, tmp_path / "run", nonfinite="rollback", max_rollbacks=2, save_steps=3, max_steps=20
    )
    with pytest.raises(NonFiniteError, match="max_rollbacks=2"):
        train(config)
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "run")[0]] == [6, 3]


def test_spikes_do_not_become_normal() -> None:
    config = TrainConfig.from_dict(
        {"model": "m", "datasets": "d", "loss_spike": "warn", "loss_spike_window": 10}
    )
    guard = LossGuard(config)
    for step in range(10):
        guard.learned(2.0 + 0.01 * (step % 2))
    limit = guard.limit()
    for bad in (50.0, math.nan, math.inf):
        guard.learned(bad)
    assert guard.limit() == limit < 3
    assert LossGuard(config).limit() == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_spike": "skip", "update": "eager", "max_grad_norm": None},
            "skip needs to skip updates",
        ),
        ({"loss_spike": "rollback", "save_strategy": "no"}, "rollback needs checkpoints"),
        ({"nonfinite": "rollback", "save_strategy": "no"}, "rollback needs checkpoints"),
    ],
)
def test_policies_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"model": "m", "datasets": "d", **changes})
