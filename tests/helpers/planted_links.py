"""A run, and links, second names and pipes planted in its folder."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.io import files
from horizon_lm.report.html import write_report
from horizon_lm.training.train import train
from small_runs import settings, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with everything that a run's folder holds."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(text, run, max_steps=2, plot_loss=True))
    write_report(run)
    return run


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """What waits for a pipe fails, and does not stop the suite."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


SETTINGS = "config.resolved.yaml"
STAGED = tuple(f".{name}.tmp" for name in (SETTINGS, "loss.png", "report.html", "trace.json"))


class Outside:
    """Files and folders outside of a run, which links in it point to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self._before = self._now()

    def plant(self, at: Path, kind: str) -> None:
        """Put a link to a file, to a folder or to nothing in place of `at`, or a second name of a file."""
        content = at.read_bytes() if at.is_file() else b"kept\nlast line, cut o"
        target = self.place / f"{at.name}-{kind}"
        files.remove(at)
        if kind == "folder":
            target.mkdir()
            (target / "keep").write_bytes(content)
        elif kind != "nothing":
            target.write_bytes(content)
        if kind == "second name":
            os.link(target, at)
        else:
            at.symlink_to(target)
        self._before = self._now()

    def _now(self) -> list[Any]:
        found = [self.place, *sorted(self.place.rglob("*"))]
        stats = [path.stat() for path in found]
        content = [path.read_bytes() if path.is_file() else None for path in found]
        return [(p, s.st_ino, s.st_mtime_ns, c) for p, s, c in zip(found, stats, content, strict=True)]

    @property
    def is_untouched(self) -> bool:
        return self._now() == self._before


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path / "outside")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "run")
