"""What files hold, as bytes: decompressed within bounds, and known by a hash that is kept.

A small file can decompress to any size. What is read row by row is held one row at a time, of at most
`LARGEST_ROW` bytes; what has to be read whole stops at `LARGEST_WHOLE`; and nothing is read that becomes more
than `LARGEST_RATIO` times its size, once that is more than `FREE_EXPANSION`. None of these bounds a plain
file, whose size its owner sees.

A kept hash stands for a file as long as its device, inode, size, mtime and ctime are the same. A write moves
ctime, and nothing can set it back; but clocks tick, and a file that is mapped into memory may be written for
half a minute after its times have moved. So only what had been left alone for `_SETTLED_SECONDS` is kept.
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
# What reading a damaged gzip file raises.
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


def suffix_of(path: Path) -> str:
    """The file type in a name: `.jsonl`, or `.jsonl.gz` where it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed as it is read."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_compressed(path) else path.open("rb")


def read_whole(path: Path) -> bytes:
    """All of the content. Raises DataError for a compressed file that holds too much."""
    if not is_compressed(path):
        return path.read_bytes()
    most = min(LARGEST_WHOLE, max(FREE_EXPANSION, LARGEST_RATIO * path.stat().st_size))
    with open_bytes(path) as file:
        content = file.read(most + 1)
    check_expansion(path, len(content))
    if len(content) > LARGEST_WHOLE:
        raise DataError(
            f"{path} holds more than {LARGEST_WHOLE >> 30} GiB once decompressed",
            hint="write it as .jsonl.gz, which is read row by row",
        )
    return content


def check_expansion(path: Path, num_bytes: int) -> None:
    """Raise DataError if a file has become so many bytes as no text does: a decompression bomb."""
    if num_bytes > FREE_EXPANSION and num_bytes > LARGEST_RATIO * path.stat().st_size:
        raise DataError(
            f"{path} ({size(path.stat().st_size)}) becomes more than {LARGEST_RATIO} times its size once "
            f"decompressed: {size(num_bytes)} so far",
            hint="write it again without compression, if it is what it should be",
        )


def lines(path: Path) -> Iterator[bytes]:
    """Each line with its end. Raises DataError for a line of a compressed file that is too long."""
    longest = LARGEST_ROW if is_compressed(path) else -1
    with open_bytes(path) as file:
        number = total = 0
        while line := file.readline(longest):
            number += 1
            total += len(line)
            if len(line) == longest and not line.endswith(b"\n"):
                raise DataError(
                    f"{path}:{number} is longer than {LARGEST_ROW >> 20} MiB once decompressed",
                    hint="write one row on each line",
                )
            if total > FREE_EXPANSION and longest > 0:
                check_expansion(path, total)
            yield line


def damage(path: Path, error: BaseException, last: str | None) -> DataError:
    """The error for a file that cannot be decompressed; last: the place of the last row that was read."""
    what = "it ends early" if isinstance(error, EOFError) else str(error)
    return DataError(
        f"{path} cannot be decompressed: {what}; "
        + (f"the last row that can be read is {last}" if last else "no row can be read"),
        hint="copy or compress it again; 'gzip -t FILE' checks one",
    )


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
                known = json.loads(read_bytes(self._path))
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
        """Keep what was found; of too many, those that were not asked for go first. An error means that files
        are read again."""
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
