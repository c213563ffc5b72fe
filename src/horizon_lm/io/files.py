"""The one place that writes files, and that opens those which somebody else may have put there.

A run's folder may hold links, named pipes, and files that have a second name elsewhere. So:

- a file is written under a new name and renamed: whatever lay in its place gives way, a link too, and what a
  link points to is never opened (`write_file`);
- a file that goes on is never a link, and never shared with a second name (`open_log`);
- folders below the run's own are opened one by one, never through a link (`below`, `make_folder`);
- reading never waits for a device, or for a pipe that nobody writes to (`open_file`, `read_stream`).

A file that the user names on the command line is written as every program would write it (`write_output`).
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

PATIENCE_SECONDS = 30.0  # for a pipe in place of a configuration file
STAGED = re.compile(r"\.horizon-[0-9a-f]{16}\.tmp")  # the name of a file that is being written
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

Content = str | bytes | Callable[[IO[bytes]], object]


# Writing.


def write_file(path: Path, content: Content, *, below: Path | None = None) -> None:
    """Put a file in place: whole, or as it was. A link in its place is replaced, not followed.

    content: text (UTF-8), bytes, or a function that writes into the open file. below: a parent of `path`;
    folders from there on are made where they are missing, and may not be links. Raises OSError, and
    ConfigError for such a link.
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


def write_output(path: Path, text: str) -> None:
    """Write a file that the user named: through a link, into a device, as the user has it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def create(path: Path) -> BinaryIO:
    """A new file, open for writing. Raises OSError where anything has its name, a link too."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb")


def open_log(path: Path, *, goes_on: bool) -> TextIO:
    """A file that lines are appended to.

    goes_on: it keeps the lines that it has; a last one that was cut off goes. Else it is a new one. Raises
    OSError, and ConfigError for a link that would go on. A file with a second name elsewhere is copied first.
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
    """Make a folder in the folder `below` where there is none. Raises ConfigError for a link, OSError."""
    with _opened_folder(path, below):
        pass


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link, of which what it points to stays. Raises
    OSError; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_folder(source: Path, target: Path) -> None:
    """Rename a folder (or what stands for one). A link in its new place is replaced. Raises OSError where a
    file, or a folder that is not empty, is there."""
    if target.is_symlink():
        target.unlink()
    os.rename(source, target)


def check_own(path: Path) -> None:
    """Raises ConfigError for a link, and for a device or pipe, where a run goes on with its own file or
    folder."""
    if path.is_symlink():
        raise _is_link(path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ConfigError(f"{path} is {_kind(path.stat().st_mode)}, not a file", hint="remove it")


def _is_link(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a link to {os.readlink(path)}: a run writes only inside its own folder",
        hint="replace the link by a copy of what it points to, or remove it",
    )


@contextmanager
def _opened_folder(path: Path, below: Path | None) -> Iterator[int]:
    """A handle of the folder `path`: what it is used for happens there, whatever takes its name meanwhile."""
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
    """A new file under a name of its own, with its lock held. One that another process sweeps before it is
    locked is made again."""
    while True:
        name = f".horizon-{os.urandom(8).hex()}.tmp"
        file = os.open(name, _NEW, 0o666, dir_fd=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError as error:  # another kind: a file system without locks, where nothing is swept
            is_ours = not isinstance(error, BlockingIOError)
        with suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if is_ours and os.path.samestat(os.fstat(file), found):
                return file, name
        os.close(file)


def _sweep(folder: int) -> None:
    """Remove what killed processes were writing: files whose lock can be taken."""
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
    """A file to read. Raises OSError, also for a pipe, a device or a folder, for which it does not wait."""
    check_is_file(path)
    file = os.fdopen(os.open(path, _READ), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # changed since
        file.close()
        check_is_file(path)
    return file


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raises OSError unless `path` is a file, or a link to one."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, f"it is {_kind(mode)}, not a file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file; see `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a file in UTF-8; see `open_file`. Raises UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def read_stream(path: str | os.PathLike[str], limit: int) -> bytes:
    """The first `limit` bytes of a file, or of a pipe (`<(command)`, /dev/stdin) that ends within
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
    """What lies there instead of a file, in words."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")
