"""What files hold, as a hash of their bytes, which is kept: 100 GB of data are not read again at every start.

A kept hash stands for a file as long as its device, inode, size, mtime and ctime are the same. A write moves
ctime, and nothing can set it back; but clocks tick, and a file that is mapped into memory may be written for
half a minute after its times have moved. So only what had been left alone for `_SETTLED_SECONDS` is kept.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from horizon_lm.data.compressed import suffix_of
from horizon_lm.errors import DataError
from horizon_lm.io import files

_NAME = "hashes.json"
_SETTLED_SECONDS = 60.0
_SMALL = 1 << 16  # bytes; reading so little takes no longer than looking a hash up
_MOST_FILES = 200_000
_CHUNK = 1 << 22


class FileHashes:
    """xxh3-128 of files, kept in `folder` (None: nowhere) by `save`."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _NAME
        self._known: dict[str, list[Any]] = {}  # device:inode:prefix -> [size, mtime, ctime, hash]
        self._found: dict[str, list[Any]] = {}
        if self._path is not None:
            with suppress(OSError, ValueError, RecursionError):
                known = json.loads(files.read_bytes(self._path))
                self._known = known if isinstance(known, dict) else {}

    def of(self, paths: Iterable[Path], prefix: str | None = None) -> Iterator[bytes]:
        """A hash of `prefix` (of its file type, if that is None) and the bytes of each file. Raises DataError
        for one that cannot be read."""
        for path in paths:
            try:
                yield self._of(path, suffix_of(path) if prefix is None else prefix)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
                ) from error

    def _of(self, path: Path, prefix: str) -> bytes:
        with files.open_file(path) as file:
            before = os.fstat(file.fileno())
            signature = _signature(before)
            key = f"{before.st_dev}:{before.st_ino}:{prefix}"
            known = self._known.get(key)
            if isinstance(known, list) and len(known) == 4 and known[:3] == signature:
                with suppress(TypeError, ValueError):
                    self._found[key] = known
                    return bytes.fromhex(known[3])
            now = time.time()
            digest = xxhash.xxh3_128(prefix.encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            after = os.fstat(file.fileno())
        changed = max(after.st_mtime, after.st_ctime)
        if after.st_size >= _SMALL and _signature(after) == signature and now - changed > _SETTLED_SECONDS:
            self._found[key] = [*signature, digest.hexdigest()]
        return digest.digest()

    def save(self) -> None:
        """Keep what was found; of too many, those that were not asked for go first. An error means that files
        are read again."""
        new = {key: entry for key, entry in self._found.items() if self._known.get(key) != entry}
        if self._path is None or not new:
            return
        kept = {key: entry for key, entry in self._known.items() if key not in self._found}
        entries = [*kept.items(), *self._found.items()][-_MOST_FILES:]
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_file(self._path, json.dumps(dict(entries)))


def _signature(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
