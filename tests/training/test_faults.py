"""What breaks while a run works: disks that fail, memory that runs out, folders in use; and long runs."""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from faulty_runs import events
from faulty_runs import text as text
from horizon_lm import cli
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.config import TrainConfig
from horizon_lm.engine.ops import Ops
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.memory.ways import next_smaller
from horizon_lm.schedule import Op
from horizon_lm.training import checkpoint_series as series
from horizon_lm.training import save as saver
from horizon_lm.training.train import train
from sizes import times
from small_runs import losses_of, settings, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


# Disks that fail while a run goes on.


class Sick(Disk):
    """Fails at the calls that `ill` picks, by number."""

    def __init__(self, ill: Callable[[int], bool], code: int) -> None:
        self.ill, self.code, self.count = ill, code, 0

    def before(self, what: str, path: Path) -> None:
        self.count += what == "mkdir" and path.name.startswith(".tmp-")
        if what == "write" and self.ill(self.count):
            raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_for_a_while_is_reported_and_the_run_goes_on(
    code: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight"
    train(settings(text, straight, max_steps=8, save_steps=8))
    monkeypatch.setattr(series, "Disk", lambda: Sick(lambda save: save in (3, 4, 5), code))
    run = tmp_path / "run"
    train(settings(text, run, max_steps=8, save_steps=1, save_total_limit=1))
    shown = capsys.readouterr().out
    for step in (3, 4, 5):
        assert f"warning: no checkpoint of step {step}: {os.strerror(code)}" in shown
    saved = [e.get("error") is None for e in events(run, "checkpoint")]
    assert saved == [True] * 2 + [False] * 3 + [True] * 3
    assert losses_of(run) == losses_of(straight)
    assert tensors_of(run / "checkpoint-8") == tensors_of(straight / "checkpoint-8")
    assert {p.name for p in run.glob("*checkpoint-*")} == {"checkpoint-8"}


def test_too_many_failures_in_a_row_end_the_run_with_the_last_good_one_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(series, "Disk", lambda: Sick(lambda save: save > 2, errno.ENOSPC))
    with pytest.raises(DoesNotFitError, match="4 checkpoints in a row") as caught:
        train(settings(text, tmp_path / "run", max_steps=20, save_steps=1, save_total_limit=1))
    assert caught.value.exit_code == 3
    found, rejected = list_checkpoints(tmp_path / "run")
    assert [c.manifest.step for c in found] == [2] and not rejected
    monkeypatch.setattr(series, "Disk", lambda: Sick(lambda save: save > 0, errno.ENOSPC))
    train(settings(text, tmp_path / "on", max_steps=6, save_steps=1, max_failed_saves=None))


def test_too_little_room_is_seen_before_a_byte_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = iter([10**12, 10**12, 1000, 1000])  # of the plan, before the run, and before each checkpoint
    monkeypatch.setattr(series.shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(free)}))
    train(settings(text, tmp_path / "run", max_steps=2, save_steps=1))
    out = capsys.readouterr().out
    assert re.search(r"no checkpoint of step 1: it needs [0-9.]+ kB of disk space, 1.00 kB are free", out)
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_folder_that_vanishes_does_not_end_the_steps(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Vanishing(Disk):
        count = 0

        def before(self, what: str, path: Path) -> None:
            Vanishing.count += what == "fsync"
            if Vanishing.count == 3 and what == "fsync":
                shutil.rmtree(path.parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series, "Disk", Vanishing)
        train(settings(text, tmp_path / "run", max_steps=4, save_steps=2))
    assert "no checkpoint of step 2: No such file" in capsys.readouterr().out
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "run")[0]] == [4]


# Memory that runs out.


@pytest.mark.parametrize("update", ["deferred", "eager"])
def test_a_device_out_of_memory_leaves_the_checkpoint_and_names_the_next_smaller_choice(
    update: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a backward pass, beside which a checkpoint is being written."""
    common = {"max_steps": 8, "save_steps": 3, "update": update, "max_grad_norm": None}
    train(settings(text, tmp_path / "straight", **common))
    honest, calls = Ops._backward, iter(range(1, 1000))

    def backward(self: Ops, step: Any, op: Op) -> None:
        if next(calls) == 17:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        honest(self, step, op)

    with monkeypatch.context() as patch:
        patch.setattr(Ops, "_backward", backward)
        with pytest.raises(DoesNotFitError, match="Tried to allocate 2 GiB") as caught:
            train(settings(text, tmp_path / "run", **common))
    assert caught.value.exit_code == 3 and caught.value.hint is not None
    assert caught.value.hint.startswith("next smaller: boundaries=host; horizon resume ")
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    assert cli.main(["resume", str(tmp_path / "run"), "boundaries=host"]) == 0
    one, two = tmp_path / "straight" / "checkpoint-6", tmp_path / "run" / "checkpoint-6"
    assert tensors_of(one) == tensors_of(two)


def test_the_next_smaller_choices_end_and_each_is_a_valid_configuration() -> None:
    config = TrainConfig.from_dict(
        {"model": "m", "datasets": "d", "per_device_train_batch_size": 8, "activations": "keep", "slots": 4}
    )
    seen = []
    while (choice := next_smaller(config)) not in seen and len(seen) < 40:
        seen.append(choice)
        pairs = dict(part.split("=") for part in choice.split())
        config = config.replace(**{k: int(v) if v.isdigit() else v for k, v in pairs.items()})
    assert seen[:3] == ["slots=2", "activations=recompute", "boundaries=host"]
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=8" in seen
    assert any(choice.startswith("max_length=") for choice in seen) and len(seen) > 10


# Two runs, one folder.


def test_a_folder_in_use_is_refused(text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", max_steps=3, save_steps=1)
    train(config)
    script = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigError, match="in use by another run"):
            train(config.replace(**changes))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    other.kill()
    other.wait()
    train(config.replace(resume_from_checkpoint="latest"))  # the lock went with the process that held it


def test_a_run_folder_may_have_any_name(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run – ünïcode = 'x'"
    train(settings(text, run, max_steps=2, save_steps=1))
    assert cli.main(["verify", str(run)]) == 0
    assert cli.main(["resume", str(run)]) == 0


# Long runs.


@pytest.mark.timeout(times(300, 1800))
def test_steps_and_checkpoints_leave_nothing_behind(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 steps (200 in the short form), a checkpoint every 10: resident memory, open files and threads."""
    steps = times(200, 2000)
    process, seen = psutil.Process(), []
    after = saver.Saver.after

    def look(self: Any, record: Any, due: Any, *, is_last: bool, **more: Any) -> None:
        after(self, record, due, is_last=is_last, **more)
        if record.step % 10 == 9 and not is_last:  # no checkpoint is being written
            self.finish()
            gc.collect()
            seen.append((process.memory_info().rss, process.num_fds(), threading.active_count()))

    monkeypatch.setattr(saver.Saver, "after", look)
    train(
        settings(text, tmp_path / "run", max_steps=steps, save_steps=10, save_total_limit=2, progress="off")
    )
    settled = seen[len(seen) // 4 :]
    grown = settled[-1][0] / settled[0][0] - 1
    print(
        f"{steps} steps: resident memory {grown:+.2%}, open files and threads {set(s[1:] for s in settled)}"
    )
    assert grown < 0.01
    assert len({s[1:] for s in settled}) == 1
