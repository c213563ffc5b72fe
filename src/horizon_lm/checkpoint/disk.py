"""All calls that change a checkpoint on disk, in one place, so that tests can make them fail."""

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

from horizon_lm.errors import CheckpointError
from horizon_lm.io import files

PIECE_BYTES = 16 << 20  # written between two checks whether the checkpoint is still wanted; read at once
_BLOCK = 4096  # bytes: alignment of direct writes
_DIRECT = getattr(os, "O_DIRECT", 0)
_spare: list[np.ndarray] = []  # the last file's buffer: a new one costs a page fault per 4 KB


class Disk:
    """The disk. `before` is called ahead of each call, with its name and path.

    buffer_bytes: size of the staging buffer of an open file; a multiple of 4096. block_bytes: part of a file
    of many ranks that is verified by itself.
    """

    buffer_bytes = 4 << 20
    block_bytes = 16 << 20

    def before(self, what: str, path: Path) -> None:
        """Do nothing; tests override it."""

    def make_folder(self, path: Path) -> None:
        self.before("mkdir", path)
        path.mkdir()

    def create(self, path: Path) -> int:
        """Create a file; never an existing one, never through a link."""
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
        """Sync a file or folder that is not open."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.sync(file, path)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        files.put_folder(source, target)

    def remove(self, folder: Path) -> None:
        """Remove a folder as far as possible; of a link only the link."""
        with suppress(OSError):
            self.before("remove", folder)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)


class HashedFile:
    """A new file whose size and checksums are known when it is closed.

    blocks: checksum of each `Disk.block_bytes` of the file, if asked for (`in_blocks`).

    Writes go through a small buffer and, if the file system supports O_DIRECT, past the page cache: the store
    has most of the memory, nobody reads the file soon, and copying into the cache costs several times the CPU
    time of a direct write.
    """

    def __init__(self, disk: Disk, path: Path, *, in_blocks: bool = False) -> None:
        self._disk, self._path, self._in_blocks = disk, path, in_blocks
        self._hash = xxhash.xxh3_128()
        self._block, self._block_filled = xxhash.xxh3_128(), 0
        self.blocks: list[str] = []
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
            self._end_block()
        finally:
            os.close(self._file)
            if not _spare:
                _spare.append(self._buffer)
        return self.size, self._hash.hexdigest()

    def _flush(self) -> None:
        data = memoryview(self._buffer)[: self._filled]  # type: ignore[arg-type]
        self._filled = 0
        self._hash.update(data)
        if self._in_blocks:
            self._update_blocks(data)
        whole = len(data) - len(data) % _BLOCK if self.is_direct else len(data)
        if whole:
            self._write(data[:whole])
        if whole < len(data):  # the end of the file
            self._set_direct(False)
            self._write(data[whole:])

    def _update_blocks(self, data: memoryview) -> None:
        while len(data):
            taken = min(len(data), self._disk.block_bytes - self._block_filled)
            self._block.update(data[:taken])
            data, self._block_filled = data[taken:], self._block_filled + taken
            if self._block_filled == self._disk.block_bytes:
                self._end_block()

    def _end_block(self) -> None:
        if self._block_filled:
            self.blocks.append(self._block.hexdigest())
            self._block, self._block_filled = xxhash.xxh3_128(), 0

    def _write(self, data: memoryview) -> None:
        try:
            self._disk.write(self._file, self._path, data)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.is_direct:
                raise
            self._set_direct(False)  # a file system that accepts the flag and rejects the write
            os.lseek(self._file, self.size, os.SEEK_SET)
            self._disk.write(self._file, self._path, data)
        self.size += len(data)

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (_DIRECT if wanted else 0))
        self.is_direct = wanted and bool(_DIRECT)


def _take_buffer(num_bytes: int) -> np.ndarray:
    """Return a page-aligned buffer."""
    spare = _spare.pop() if _spare else None
    if spare is not None and len(spare) == num_bytes:
        return spare
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)


def checksum(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def damaged(place: str | Path, problem: str) -> CheckpointError:
    """Return the error for a file or folder of a checkpoint that cannot be used."""
    return CheckpointError(f"{place}: {problem}", hint="resume from an earlier checkpoint")
