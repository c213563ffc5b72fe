"""Every call that changes a checkpoint on disk, in one place: tests replace it by one that fails or dies."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import xxhash

PIECE_BYTES = 16 << 20  # written between two looks at whether the checkpoint is still wanted


class Disk:
    """The disk itself. `before` is called ahead of each call, with what it does and where."""

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
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.sync(file, path)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        os.rename(source, target)

    def remove(self, folder: Path) -> None:
        """Remove a folder and what is in it; as much of it as can be."""
        with suppress(OSError):
            self.before("remove", folder)
            shutil.rmtree(folder, ignore_errors=True)


class HashedFile:
    """A new file whose size and checksum are known when it is closed."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self._hash = xxhash.xxh3_128()
        self.size = 0
        self._file = disk.create(path)

    def write(self, data: memoryview) -> None:
        self._hash.update(data)
        self._disk.write(self._file, self._path, data)
        self.size += len(data)

    def close(self) -> tuple[int, str]:
        os.close(self._file)
        return self.size, self._hash.hexdigest()


def checksum(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))
