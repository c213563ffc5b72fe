"""Temporary folders with an owner, so that those of killed processes can be removed.

`files` removes unfinished files; `sweep_files` removes those of earlier versions.

A folder has a file `.owner`, which its process keeps locked (flock). The system releases the lock however the
process ends, so a folder with a free lock has no owner. A fork of the owner holds the lock too, as it may
still use the folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OWNER = ".owner"
_OLD_SECONDS = 86_400.0  # age from which a folder without a lock file, of an earlier version, has no owner


class OwnedFolder:
    """A temporary folder `prefix`* of this process, removed with this object or swept after a kill."""

    def __init__(
        self, prefix: str, root: Path | None = None, *, relatives: re.Pattern[str] | None = None
    ) -> None:
        """Create the folder, and sweep others first.

        root: the system's temporary folder by default. relatives: names of other folders to sweep. Raises
        OSError.
        """
        root = Path(tempfile.gettempdir()) if root is None else root
        sweep(prefix, root, relatives)
        self.path, self._lock = _made(prefix, root)
        self._finalizer = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())

    def disown(self) -> None:
        """Keep the folder, without its lock file, as it is about to be renamed."""
        if self._finalizer.detach() is not None:
            (self.path / _OWNER).unlink(missing_ok=True)
            os.close(self._lock)

    def release(self) -> None:
        """Remove the folder."""
        self._finalizer()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder in an `OwnedFolder`."""
    owned = OwnedFolder(prefix)
    try:
        folder = owned.path / "files"
        folder.mkdir()
        yield folder
    finally:
        owned.release()


def _made(prefix: str, root: Path) -> tuple[Path, int]:
    """Create a folder and lock it; retry if another process sweeps it before it is locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(path / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path / _OWNER)):
                return path, lock


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker leaves it to its parent
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        os.close(lock)


def sweep(prefix: str, root: Path, relatives: re.Pattern[str] | None = None) -> list[Path]:
    """Remove folders `prefix`* or matching `relatives` in `root` whose process has ended; return them.

    Never removes links, folders in use or those of other users. Several processes may sweep at once.
    """
    gone = []
    for path in _candidates(prefix, root, relatives):
        with suppress(OSError), _taken(path) as is_free:
            if is_free:
                shutil.rmtree(path, ignore_errors=True)
                gone.append(path)
    return gone


def sweep_files(names: re.Pattern[str], root: Path) -> None:
    """Remove this user's files in `root` whose names match and that are unchanged for a day."""
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):
            found = path.lstat()
            is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
            if is_ours and names.fullmatch(path.name) and time.time() - found.st_mtime > _OLD_SECONDS:
                path.unlink()


def _candidates(prefix: str, root: Path, relatives: re.Pattern[str] | None) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return
    for name in names:
        if not name.startswith(prefix) and (relatives is None or not relatives.fullmatch(name)):
            continue
        path = root / name
        with suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                yield path


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Lock the folder and yield whether its lock was free.

    Without a lock file, as earlier versions left them, only an old folder is free.
    """
    try:
        file = os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield time.time() - path.stat().st_mtime > _OLD_SECONDS
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(file)
