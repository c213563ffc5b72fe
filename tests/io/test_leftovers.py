"""Temporary folders of killed processes are swept at the next start, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from horizon_lm.checkpoint.export import write_folder
from horizon_lm.data.tokens import TokenWriter
from horizon_lm.io import leftovers
from horizon_lm.io.leftovers import OwnedFolder, sweep, temporary_folder

_HOLD = """
import sys
from pathlib import Path
from horizon_lm.io.leftovers import OwnedFolder
folder = OwnedFolder("horizon-tokens-", Path(sys.argv[1]))
(folder.path / "tokens.bin").write_bytes(b"1234")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_folders_of_killed_processes_are_swept(tmp_path: Path) -> None:
    """The negative controls, side by side: a live process's, another prefix, a link, a young one of an
    earlier version."""
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    dead, alive = (Path(p.stdout.readline().decode().strip()) for p in started)  # type: ignore[union-attr]
    os.kill(started[0].pid, signal.SIGKILL)
    started[0].wait()
    kept = [tmp_path / "horizon-tokens-young", tmp_path / "other-folder"]
    old = tmp_path / "horizon-tokens-old"
    for path in (*kept, old):
        path.mkdir()
    os.utime(old, (0, time.time() - 2 * 86_400))
    os.symlink(dead, tmp_path / "horizon-tokens-link")
    try:
        assert dead.is_dir() and alive.is_dir()
        mine = OwnedFolder("horizon-tokens-", tmp_path)
        assert not dead.exists() and not old.exists()
        assert alive.is_dir() and (alive / "tokens.bin").read_bytes() == b"1234"
        assert all(path.is_dir() for path in kept) and (tmp_path / "horizon-tokens-link").is_symlink()
        assert not sweep("horizon-tokens-", tmp_path) and mine.path.is_dir()
        place = mine.path
        del mine
        assert not place.exists()
    finally:
        started[1].communicate(b"")
    assert not alive.exists()  # it ended by itself


def test_folders_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "horizon-tokens-a").mkdir()
    (tmp_path / "horizon-tokens-a" / ".owner").touch()
    monkeypatch.setattr(leftovers.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    assert sweep("horizon-tokens-", tmp_path) == []
    monkeypatch.undo()
    assert len(sweep("horizon-tokens-", tmp_path)) == 1


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, swept = leftovers.fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not swept:
            monkeypatch.setattr(leftovers.fcntl, "flock", flock)
            swept.extend(sweep("horizon-tokens-", tmp_path))
        flock(file, how)

    monkeypatch.setattr(leftovers.fcntl, "flock", late)
    folder = OwnedFolder("horizon-tokens-", tmp_path)
    assert len(swept) == 1 and folder.path.is_dir() and folder.path != swept[0]


def test_token_caches_are_whole_or_absent(tmp_path: Path) -> None:
    """What a killed run left beside its place goes with the next writer; the lock file is no part of it."""
    place = tmp_path / "key"
    left = [
        tmp_path / name for name in (".horizon-tokens-left", f".{'0a' * 16}.abcd_123")
    ]  # of any other key
    kept = [tmp_path / name for name in (".git", f".{'0a' * 16}", ".key.abcd_123")]
    for folder in (*left, *kept):
        folder.mkdir()
        (folder / ".owner").touch()
    with TokenWriter(place, np.dtype(np.uint16)) as writer:
        assert not any(folder.exists() for folder in left) and all(folder.exists() for folder in kept)
        writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=[], is_kept=True)
    for folder in kept:
        (folder / ".owner").unlink()
        folder.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert ".owner" not in os.listdir(place)
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "two", np.dtype(np.uint16)):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from horizon_lm.checkpoint import export
from horizon_lm.io.leftovers import temporary_folder

place, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "files":
    with temporary_folder("horizon-files-") as folder:
        (folder / "a").write_text("a")
        die()
if when == "old":
    rename = os.rename
    os.rename = lambda a, b: (rename(a, b), die()) if Path(b).name == "old" else rename(a, b)
export.write_folder(place, die if when == "writing" else lambda folder: (folder / "a").write_text("new"))
"""


def _killed(place: Path, when: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(place.parent)}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(place), when], env=environment)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_export_left_is_swept_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes, and between the old folder and the new one, which leaves the old one aside:
    that is put back, also where the next one fails. The negative control: a folder of somebody else's."""
    place, own = tmp_path / "model", tmp_path / ".model.mine"
    for folder in (place, own):
        folder.mkdir()
        (folder / "a").write_text("old")
    os.utime(own, (0, 0))
    _killed(place, "files")
    _killed(place, "writing")
    _killed(place, "old")
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 4 and "model" not in left  # mine, what was staged last, the old one, files

    def fails(_: Path) -> None:
        raise OSError("full")

    with pytest.raises(Exception, match="full"):
        write_folder(place, fails)
    assert (place / "a").read_text() == "old"
    write_folder(place, lambda folder: (folder / "a").write_text("new") and None)
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    with temporary_folder("horizon-files-") as folder:
        assert list(folder.iterdir()) == []
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".model.horizon-")}
    assert left == {"model", ".model.mine"} and os.listdir(place) == ["a"]
    for path in tmp_path.glob(".model.horizon-*"):  # disowned before it was renamed: swept a day later
        os.utime(path, (0, 0))
    write_folder(place, lambda folder: (folder / "a").write_text("newer") and None)
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.mine"}
    assert (place / "a").read_text() == "newer"
