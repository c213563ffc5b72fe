"""File contents: bounded decompression, and cached content hashes.

A small gzip file can expand to any size. Files read row by row hold one row of at most `LARGEST_ROW` bytes;
files read at once stop at `LARGEST_WHOLE`; and no file may expand beyond `LARGEST_RATIO` times its size, once
that exceeds `FREE_EXPANSION`. Uncompressed files are not limited.

A cached hash is valid while device, inode, size, mtime and ctime are unchanged. Every write moves ctime,
which cannot be set back; but clocks tick, and a memory-mapped file may change for half a minute after its
times moved. So only files unchanged for `_SETTLED_SECONDS` are cached.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from horizon_lm.errors import DataError
from horizon_lm.io.files import open_file, read_bytes, write_file
from horizon_lm.words import size

LARGEST_ROW = 1 << 28  # 256 MiB
LARGEST_WHOLE = 1 << 32  # 4 GiB
LARGEST_RATIO = 200  # text compresses to a third or a tenth, logs to a fiftieth
FREE_EXPANSION = 1 << 28
# Exceptions from reading a damaged gzip file.
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


def suffix_of(path: Path) -> str:
    """Return the file type in a name: `.jsonl`, or `.jsonl.gz` if compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressing as it is read."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_compressed(path) else path.open("rb")


def read_whole(path: Path) -> bytes:
    """Read the whole file. Raises DataError for a compressed file that expands too far."""
    if not is_compressed(path):
        return path.read_bytes()
    most = min(LARGEST_WHOLE, max(FREE_EXPANSION, LARGEST_RATIO * path.stat().st_size))
    with open_bytes(path) as file:
        content = file.read(most + 1)
    check_expansion(path, len(content))
    if len(content) > LARGEST_WHOLE:
        raise DataError(
            f"{path} holds more than {LARGEST_WHOLE >> 30} GiB once decompressed",
            hint="save it as .jsonl.gz, which is read row by row",
        )
    return content


def check_expansion(path: Path, num_bytes: int) -> None:
    """Raise DataError if a file expands as no text does: a decompression bomb."""
    if num_bytes > FREE_EXPANSION and num_bytes > LARGEST_RATIO * path.stat().st_size:
        raise DataError(
            f"{path} ({size(path.stat().st_size)}) expands to more than {LARGEST_RATIO} times its size: "
            f"{size(num_bytes)} so far",
            hint="if you trust the file, rewrite it without compression",
        )


def lines(path: Path) -> Iterator[bytes]:
    """Yield lines with their ends. Raises DataError for a line of a compressed file that is too long."""
    longest = LARGEST_ROW if is_compressed(path) else -1
    with open_bytes(path) as file:
        number = total = 0
        while line := file.readline(longest):
            number += 1
            total += len(line)
            if len(line) == longest and not line.endswith(b"\n"):
                raise DataError(
                    f"{path}:{number} is longer than {LARGEST_ROW >> 20} MiB once decompressed",
                    hint="write one row per line",
                )
            if total > FREE_EXPANSION and longest > 0:
                check_expansion(path, total)
            yield line


def damage(path: Path, error: BaseException, last: str | None) -> DataError:
    """Return the error for a damaged gzip file; last: location of the last readable row."""
    what = "it ends early" if isinstance(error, EOFError) else str(error)
    return DataError(
        f"{path} cannot be decompressed: {what}; "
        + (f"the last readable row is {last}" if last else "no row is readable"),
        hint="copy or compress it again, and check it with 'gzip -t FILE'",
    )


_NAME = "hashes.json"
_SETTLED_SECONDS = 60.0
_SMALL = 1 << 16  # bytes; reading less is as fast as a look-up
_MOST_FILES = 200_000
_CHUNK = 1 << 22


class FileHashes:
    """xxh3-128 hashes of files, cached in `folder` (None: not cached) by `save`."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _NAME
        self._known: dict[str, list[Any]] = {}  # device:inode:prefix -> [size, mtime, ctime, hash]
        self._found: dict[str, list[Any]] = {}
        if self._path is not None:
            with suppress(OSError, ValueError, RecursionError):
                known = json.loads(read_bytes(self._path))
                self._known = known if isinstance(known, dict) else {}

    def of(self, paths: Iterable[Path], prefix: str | None = None) -> Iterator[bytes]:
        """Hash `prefix` (default: the file type) and the bytes of each file. Raises DataError for an
        unreadable one."""
        for path in paths:
            try:
                yield self._of(path, suffix_of(path) if prefix is None else prefix)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
                ) from error

    def _of(self, path: Path, prefix: str) -> bytes:
        with open_file(path) as file:
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
        """Write the cache, dropping first what this run did not use. On an error, files are read again next
        time."""
        new = {key: entry for key, entry in self._found.items() if self._known.get(key) != entry}
        if self._path is None or not new:
            return
        kept = {key: entry for key, entry in self._known.items() if key not in self._found}
        entries = [*kept.items(), *self._found.items()][-_MOST_FILES:]
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(dict(entries)))


def _signature(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
