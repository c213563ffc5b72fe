"""The functions that write: whole files, logs, folders, and what is swept."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from horizon_lm.checkpoint.export import write_folder
from horizon_lm.checkpoint.folder import claim
from horizon_lm.errors import ConfigError
from horizon_lm.io import files
from horizon_lm.io.leftovers import sweep_files
from horizon_lm.report import loggers
from planted_links import SETTINGS, STAGED, Outside
from planted_links import base as base
from planted_links import outside as outside
from planted_links import run as run
from planted_links import soon as soon
from planted_links import text as text
from small_runs import settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def test_folders_below_are_made_and_never_links(tmp_path: Path, outside: Outside) -> None:
    """The control: without `below` the parent is the user's, who may have linked it."""
    run = tmp_path / "run"
    run.mkdir()
    files.write_file(run / "a" / "b" / "c.txt", "text", below=run)
    assert (run / "a" / "b" / "c.txt").read_text() == "text"
    outside.plant(run / "link", "folder")
    for act in (
        lambda: files.write_file(run / "link" / "c.txt", "text", below=run),
        lambda: files.write_file(run / "link" / "more" / "c.txt", "text", below=run),
        lambda: files.make_folder(run / "link", below=run),
    ):
        with pytest.raises(
            ConfigError, match=r"link is a link to .*: a run writes only inside its own folder"
        ):
            act()
    with pytest.raises(AssertionError):
        files.write_file(run / "a" / ".." / ".." / "c.txt", "text", below=run)
    assert outside.is_untouched
    files.write_file(run / "link" / "c.txt", "text")
    assert not outside.is_untouched


def test_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    old = os.umask(0o027)
    try:
        files.write_file(path, "before")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640

    def fails(file: Any) -> None:
        file.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        files.write_file(path, fails)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_file(tmp_path / "folder", b"")
    assert path.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]
    with pytest.raises(FileExistsError):
        files.create(path)
    with files.create(tmp_path / "new") as file:
        file.write(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "link")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("end", ["", "cut o"])
def test_a_log_goes_on_after_its_whole_lines(is_shared: bool, end: str, tmp_path: Path) -> None:
    log, other = tmp_path / "log", tmp_path / "other"
    log.write_text("one\ntwo\n" + end)
    if is_shared:
        os.link(log, other)
    with files.open_log(log, goes_on=True) as file:
        file.write("three\n")
    assert log.read_text() == "one\ntwo\nthree\n"
    assert not is_shared or other.read_text() == "one\ntwo\n" + end
    with files.open_log(log, goes_on=False) as file:
        file.write("new\n")
    assert log.read_text() == "new\n"


def test_what_killed_processes_were_writing_is_swept_and_no_more(tmp_path: Path, outside: Outside) -> None:
    """In use, of other names, a link: left. Files of earlier versions go when they are old."""
    dead, link = (tmp_path / f".horizon-{digit * 16}.tmp" for digit in "ab")
    dead.write_text("half")
    outside.plant(link, "file")
    other = tmp_path / ".horizon-notes.tmp"
    other.write_text("mine")

    def meanwhile(file: Any) -> None:
        """Another file is put into the folder while this one is being written."""
        assert not dead.exists()
        files.write_file(tmp_path / "b.txt", "b")
        file.write(b"a")

    files.write_file(tmp_path / "a.txt", meanwhile)
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "b.txt").read_text() == "b"
    assert other.exists() and link.is_symlink() and outside.is_untouched
    young, old, own = (tmp_path / name for name in ("tmpabcdefgh", "tmp12345678", "tmp1234567.txt"))
    for path in (young, old, own):
        path.touch()
    os.utime(old, (0, time.time() - 2 * 86_400))
    os.utime(own, (0, 0))
    from horizon_lm.plan.doctor import _EARLIER

    sweep_files(_EARLIER, tmp_path)
    assert young.exists() and own.exists() and not old.exists()


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_file_that_is_swept_before_it_is_locked_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has removed it, or holds its lock to do so, when its owner comes to lock it."""
    flock, swept, held = files.fcntl.flock, [], []

    def late(file: int, how: int) -> None:
        if not swept:
            swept.append(next(path for path in tmp_path.iterdir()))
            if moment == "before":
                swept[0].unlink()
            else:
                held.append(swept[0].open("rb+"))
                flock(held[0], how)
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_file(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and swept[0].exists() == (moment == "while")
    for file in held:
        file.close()


def test_a_run_sweeps_what_earlier_versions_left(run: Path) -> None:
    for name in STAGED:
        (run / name).write_text("half")
    with claim(str(run), overwrite=True):
        assert not [name for name in STAGED if (run / name).exists()]
    for name in (f".{SETTINGS}.tmp", f".horizon-{'0' * 16}.tmp"):  # killed as it wrote its first file
        new = run.parent / f"new{name}"
        new.mkdir()
        (new / name).touch()
        with claim(str(new), overwrite=False):
            pass


def test_an_exported_folder_takes_the_place_of_a_link(tmp_path: Path, outside: Outside) -> None:
    """What a killed export left aside is put back, unless somebody else's link pretends to be that."""
    for kind in ("file", "folder", "nothing"):
        outside.plant(tmp_path / "model", kind)
        write_folder(tmp_path / "model", lambda place: files.write_file(place / "a", kind))  # noqa: B023
        assert (tmp_path / "model" / "a").read_text() == kind and not (tmp_path / "model").is_symlink()
    (outside.place / "old").mkdir()
    (tmp_path / ".new.horizon-old-x").symlink_to(outside.place)
    before = outside._now()
    write_folder(tmp_path / "new", lambda place: files.write_file(place / "a", "b"))
    assert outside._now() == before and (tmp_path / "new" / "a").read_text() == "b"


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_loggers_do_not_follow_links(
    name: str, module: str, text: Path, tmp_path: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_writer(*place: Any, **settings: Any) -> Any:
        opened.append(place or settings["dir"])
        return SimpleNamespace(add_text=lambda *_, **__: None, flush=lambda: None)

    fake = SimpleNamespace(SummaryWriter=open_writer, init=open_writer)
    monkeypatch.setitem(sys.modules, module, fake)
    run = tmp_path / "run"
    run.mkdir()
    config = settings(text, run)
    outside.plant(run / name, "folder")
    with pytest.raises(ConfigError, match="is a link to"):
        loggers._KINDS[name].open(config, run)
    assert not opened and outside.is_untouched
    (run / name).unlink()
    loggers._KINDS[name].open(config, run)
    assert opened and (run / name).is_dir()


def test_an_output_that_the_user_names_is_written_as_the_user_has_it(
    tmp_path: Path, outside: Outside
) -> None:
    outside.plant(tmp_path / "link.yaml", "file")
    files.write_output(tmp_path / "link.yaml", "max_steps: 1")
    assert (tmp_path / "link.yaml").is_symlink() and (tmp_path / "link.yaml").read_text() == "max_steps: 1"
