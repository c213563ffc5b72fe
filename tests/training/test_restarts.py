"""Whether a process that torchrun has restarted resumes by itself: only its own run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.training import restarts
from horizon_lm.training.together import Together
from small_runs import settings


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> str:
    """The launcher of this process, as if it were torchrun, which has restarted it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    found = restarts.launcher()
    assert found is not None and found == restarts.launcher()
    return found


def run_of(tmp_path: Path, sessions: list[list[str] | None], *, with_checkpoint: bool = True) -> TrainConfig:
    """The settings of a run whose folder has these sessions, by their launchers."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    lines: list[dict[str, Any]] = [
        {"event": "start", **({"launched_by": names} if names is not None else {})} for names in sessions
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if with_checkpoint:
        (folder.path / "checkpoint-2").mkdir()  # a damaged one: `auto` then ends with 5, it never starts anew
    return settings(tmp_path / "text.txt", folder.path)


def resumed(config: TrainConfig) -> tuple[str | None, bool]:
    found, _, is_own = restarts.resumed(config, Together())
    return found.resume_from_checkpoint, is_own


def test_a_restart_resumes_the_run_of_its_launcher(torchrun: str, tmp_path: Path) -> None:
    assert resumed(run_of(tmp_path, [["other"], [torchrun, "of another node"]])) == ("auto", True)


def test_a_run_that_died_before_its_first_checkpoint_begins_as_it_was_asked_to(
    torchrun: str, tmp_path: Path
) -> None:
    assert resumed(run_of(tmp_path, [[torchrun]], with_checkpoint=False)) == (None, True)


@pytest.mark.parametrize("sessions", [[["other"]], [None], [["{}"], ["other"]], [["{}"], None]])
def test_another_run_is_never_resumed(torchrun: str, sessions: list[Any], tmp_path: Path) -> None:
    """The latest session counts: somebody has resumed or replaced the run since."""
    filled = [names and [name.format(torchrun) for name in names] for names in sessions]
    assert resumed(run_of(tmp_path, filled)) == (None, False)


def test_the_first_attempt_is_no_restart(
    torchrun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert resumed(run_of(tmp_path, [[torchrun]])) == (None, False)


@pytest.mark.parametrize("content", ["", "{", "[]\n{}\n", '{"event": 1}\n'])
def test_a_damaged_log_is_no_run_of_ours(torchrun: str, content: str, tmp_path: Path) -> None:
    config = run_of(tmp_path, [[torchrun]])
    RunFolder(Path(config.output_dir)).metrics.write_text(content)
    assert resumed(config) == (None, False)


def test_without_torchrun_nothing_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert restarts.launcher() is None and restarts.count_of() == 0
    assert resumed(run_of(tmp_path, [[]])) == (None, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "many")
    assert restarts.count_of() == 0
