"""A run that is stopped by a signal or a deadline saves, and ends with its code."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from horizon_lm import cli
from horizon_lm.errors import CheckpointError, StoppedError
from horizon_lm.training.train import train
from small_runs import losses_of, settings, tensors_of
from stopped_runs import STEPS, stop_at
from stopped_runs import straight as straight
from stopped_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)]
)
@pytest.mark.parametrize("background", [True, False])
def test_a_signal_saves_and_ends_with_its_code(
    number: signal.Signals,
    code: int,
    background: bool,
    straight: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settings(text, tmp_path / "run", max_steps=STEPS, save_steps=4, save_in_background=background)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    with monkeypatch.context() as patch:
        stop_at(patch, 9, number)
        before = signal.getsignal(number)
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == code
        assert signal.getsignal(number) is before
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        f"stopped by {number.name} after step 9: saved {tmp_path / 'run' / 'checkpoint-9'}; "
        f"to go on: horizon resume {tmp_path / 'run'}"
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "end" and lines[-1]["status"] == "interrupted"
    assert cli.main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    last = f"checkpoint-{STEPS}"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(straight / last)
    assert losses_of(tmp_path / "run") == losses_of(straight)


def test_a_deadline_saves_and_ends_in_time(text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", max_steps=100_000, save_steps=1000, deadline_minutes=1 / 20)
    with pytest.raises(StoppedError, match="stopped by deadline_minutes") as caught:
        train(config)
    assert caught.value.exit_code == 75
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-2]["step"] < 100_000
    assert any((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_at_a_step_that_is_saved_anyway_saves_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 4)
    with pytest.raises(StoppedError, match="after step 4: saved"):
        train(settings(text, tmp_path / "run", save_steps=2))
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_between_two_logged_steps_stays(straight: Path, text: Path, tmp_path: Path) -> None:
    """A new folder becomes the run's with the first step, also where that step is not logged."""
    source = str(straight / "checkpoint-11")
    config = settings(text, tmp_path / "run", max_steps=STEPS, save_steps=2, logging_steps=5)
    train(config.replace(resume_from_checkpoint=source))
    names = {p.name for p in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (12, 14, 16, 18, 20)}


def test_without_save_on_signal_the_last_regular_checkpoint_is_named(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 4)
    config = settings(text, tmp_path / "run", save_steps=3, save_on_signal=False)
    with pytest.raises(StoppedError, match=r"checkpoint-3, 1 step before"):
        train(config)


def test_a_signal_with_nothing_saved_is_no_promise(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 4)
    with pytest.raises(CheckpointError, match="no checkpoint was saved"):
        train(settings(text, tmp_path / "run", save_strategy="no"))
