"""Files that may be compressed with gzip: opened as the bytes that were compressed, with bounds.

A small file can decompress to any size. What is read row by row is held one row at a time, of at most
`LARGEST_ROW` bytes; what has to be read whole stops at `LARGEST_WHOLE`; and nothing is read that becomes more
than `LARGEST_RATIO` times its size, once that is more than `FREE_EXPANSION`. None of these bounds a plain
file, whose size its owner sees.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from horizon_lm.errors import DataError
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
