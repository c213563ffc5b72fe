"""The only module that writes files, or opens files that others may have placed.

A run's folder may contain links, named pipes, and files with a second name elsewhere. Therefore:

- `write_file` writes under a new name and renames: it replaces whatever is there, links included, and never
  opens the target of a link;
- `open_log` appends to a file, but never to a link or to a file with a second name;
- `make_folder` and `below` open folders below the run's own one by one, never through a link;
- `open_file` and `read_stream` never wait for a device or an idle pipe.

`write_output` writes a file that the user names on the command line as any program would.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from horizon_lm.errors import ConfigError

PATIENCE_SECONDS = 30.0  # for a pipe as configuration file
STAGED = re.compile(r"\.horizon-[0-9a-f]{16}\.tmp")  # the name of an unfinished file
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

Content = str | bytes | Callable[[IO[bytes]], object]


# Writing.


def write_file(path: Path, content: Content, *, below: Path | None = None) -> None:
    """Write a file atomically. Replaces a link, does not follow it.

    content: text (UTF-8), bytes, or a function that writes into the open file. below: a parent of `path`;
    creates missing folders below it. Raises OSError, and ConfigError if one of them is a link.
    """
    with _opened_folder(path.parent, below) as folder:
        _sweep(folder)
        lock, staged = _stage(folder)
        try:
            with os.fdopen(os.dup(lock), "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
            os.replace(staged, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(staged, dir_fd=folder)
            raise
        finally:
            os.close(lock)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user named, also through a link or into a device. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def create(path: Path) -> BinaryIO:
    """Create a file and open it for writing. Raises OSError if its name is taken, also by a link."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb")


def open_log(path: Path, *, goes_on: bool) -> TextIO:
    """Open a file to append lines to.

    goes_on: keep its lines, without a truncated last one; else replace the file. Copies a file with a second
    name first. Raises OSError, and ConfigError for a link that would be continued.
    """
    with _opened_folder(path.parent, None) as folder:
        if not goes_on:
            with suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=folder)
            return os.fdopen(os.open(path.name, _NEW, 0o666, dir_fd=folder), "w", encoding="utf-8")
        check_own(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(path.name, flags, dir_fd=folder)
    try:
        with open(os.dup(file), "rb") as content:
            data = content.read()
        whole = data.rfind(b"\n") + 1
        is_shared = os.fstat(file).st_nlink > 1
        if not is_shared:
            os.ftruncate(file, whole)
            return os.fdopen(os.dup(file), "a", encoding="utf-8")
    finally:
        os.close(file)
    write_file(path, data[:whole])
    return open_log(path, goes_on=True)


def make_folder(path: Path, *, below: Path) -> None:
    """Create a folder below `below` if missing. Raises ConfigError for a link, OSError."""
    with _opened_folder(path, below):
        pass


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not its target; ignore a missing one.

    Raises OSError.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_folder(source: Path, target: Path) -> None:
    """Rename a folder, replacing a link. Raises OSError if `target` is a file or a folder with content."""
    if target.is_symlink():
        target.unlink()
    os.rename(source, target)


def check_own(path: Path) -> None:
    """Raise ConfigError for a link, device or pipe in place of a file or folder that a run continues."""
    if path.is_symlink():
        raise _is_link(path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ConfigError(f"{path} is {_kind(path.stat().st_mode)}, not a file", hint="remove it")


def _is_link(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a link to {os.readlink(path)}: a run writes only inside its own folder",
        hint="replace the link by a copy of its target, or remove it",
    )


@contextmanager
def _opened_folder(path: Path, below: Path | None) -> Iterator[int]:
    """Open the folder `path` as a handle, which stays valid whatever takes its name meanwhile."""
    at = path if below is None else below
    handle = os.open(at, _FOLDER)
    try:
        for part in path.relative_to(at).parts:
            assert part != "..", path
            at = at / part
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=handle)
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            except OSError:
                if at.is_symlink():
                    raise _is_link(at) from None
                raise
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _stage(folder: int) -> tuple[int, str]:
    """Create an unfinished file and lock it; retry if another process sweeps it before it is locked."""
    while True:
        name = f".horizon-{os.urandom(8).hex()}.tmp"
        file = os.open(name, _NEW, 0o666, dir_fd=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError as error:  # unless blocked: a file system without locks, where nothing is swept
            is_ours = not isinstance(error, BlockingIOError)
        with suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if is_ours and os.path.samestat(os.fstat(file), found):
                return file, name
        os.close(file)


def _sweep(folder: int) -> None:
    """Remove unfinished files of killed processes: those whose lock is free."""
    for name in os.listdir(folder):
        if STAGED.fullmatch(name):
            with suppress(OSError):  # in use, gone, of another user, or a link
                _remove_free(name, folder)


def _remove_free(name: str, folder: int) -> None:
    file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    finally:
        os.close(file)


# Reading.


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. Raises OSError, at once for a pipe, a device or a folder."""
    check_is_file(path)
    file = os.fdopen(os.open(path, _READ), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # changed since
        file.close()
        check_is_file(path)
    return file


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a file or a link to one."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, f"it is {_kind(mode)}, not a file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file; see `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file; see `open_file`. Raises UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def read_stream(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read the first `limit` bytes of a file, or of a pipe (`<(command)`, /dev/stdin) that ends within
    `PATIENCE_SECONDS`. Raises OSError."""
    deadline, data = time.monotonic() + PATIENCE_SECONDS, bytearray()
    file = os.open(path, _READ)
    try:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        while len(data) < limit:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                reason = f"it did not end within {PATIENCE_SECONDS:g} s"
                raise TimeoutError(errno.ETIMEDOUT, reason, os.fspath(path))
            piece = os.read(file, limit - len(data))
            if not piece:
                break
            data += piece
    finally:
        os.close(file)
    return bytes(data)


def _kind(mode: int) -> str:
    """Name what is there instead of a file."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")
