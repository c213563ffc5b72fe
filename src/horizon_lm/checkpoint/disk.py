"""Every call that changes a checkpoint on disk, in one place: tests replace it by one that fails or dies."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from horizon_lm.io import files

PIECE_BYTES = 16 << 20  # written between two looks at whether the checkpoint is still wanted
_BLOCK = 4096  # bytes: where direct writes have to begin and end
_DIRECT = getattr(os, "O_DIRECT", 0)
_spare: list[np.ndarray] = []  # the buffer of the last file: a new one costs a page fault for every 4 KB


class Disk:
    """The disk itself. `before` is called ahead of each call, with what it does and where.

    buffer_bytes: of the staging memory of a file that is being written; a multiple of 4096.
    """

    buffer_bytes = 4 << 20

    def before(self, what: str, path: Path) -> None:
        """For tests."""

    def make_folder(self, path: Path) -> None:
        self.before("mkdir", path)
        path.mkdir()

    def create(self, path: Path) -> int:
        """A new file; never one that is there already, and never through a link."""
        self.before("create", path)
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, file: int, path: Path, data: memoryview) -> None:
        while len(data):
            self.before("write", path)
            data = data[os.write(file, data) :]

    def sync(self, file: int, path: Path) -> None:
        self.before("fsync", path)
        os.fsync(file)

    def sync_path(self, path: Path) -> None:
        """A file or a folder that is not open."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.sync(file, path)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        files.put_folder(source, target)

    def remove(self, folder: Path) -> None:
        """Remove a folder and what is in it, as much of it as can be; of a link never what it points to."""
        with suppress(OSError):
            self.before("remove", folder)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)


class HashedFile:
    """A new file whose size and checksum are known when it is closed.

    Written through a small buffer and, where the file system can (O_DIRECT), past the page cache: that
    would be filled with what nobody reads, beside a store that has most of the memory, and copying into it
    takes several times the processor time that the disk needs.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self._hash = xxhash.xxh3_128()
        self.size = 0
        self._file = disk.create(path)
        self._buffer = _take_buffer(disk.buffer_bytes)
        self._filled = 0
        self.is_direct = False
        with suppress(OSError):
            self._set_direct(True)

    def write(self, data: memoryview) -> None:
        source = np.frombuffer(data, dtype=np.uint8)
        while len(source):
            taken = min(len(source), len(self._buffer) - self._filled)
            np.copyto(self._buffer[self._filled : self._filled + taken], source[:taken])
            source, self._filled = source[taken:], self._filled + taken
            if self._filled == len(self._buffer):
                self._flush()

    def close(self) -> tuple[int, str]:
        try:
            self._flush()
        finally:
            os.close(self._file)
            if not _spare:
                _spare.append(self._buffer)
        return self.size, self._hash.hexdigest()

    def _flush(self) -> None:
        data = memoryview(self._buffer)[: self._filled]  # type: ignore[arg-type]
        self._filled = 0
        self._hash.update(data)
        whole = len(data) - len(data) % _BLOCK if self.is_direct else len(data)
        if whole:
            self._write(data[:whole])
        if whole < len(data):  # the end of the file
            self._set_direct(False)
            self._write(data[whole:])

    def _write(self, data: memoryview) -> None:
        try:
            self._disk.write(self._file, self._path, data)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.is_direct:
                raise
            self._set_direct(False)  # a file system that took the flag and not the write
            os.lseek(self._file, self.size, os.SEEK_SET)
            self._disk.write(self._file, self._path, data)
        self.size += len(data)

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (_DIRECT if wanted else 0))
        self.is_direct = wanted and bool(_DIRECT)


def _take_buffer(num_bytes: int) -> np.ndarray:
    """Page-aligned bytes."""
    spare = _spare.pop() if _spare else None
    if spare is not None and len(spare) == num_bytes:
        return spare
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)


def checksum(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))
