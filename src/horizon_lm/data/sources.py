"""Rows from files: text, JSON lines, JSON, CSV and parquet, in a file, a folder or a glob; Python's library.

A source is read lazily, one row at a time, and each row comes with the place where it stands. A text file is
one row with the column `text`. All but parquet may be compressed with gzip (`.jsonl.gz`). Rows that cannot be
read come as a `DataError` in place of the row, so that `on_bad_row: skip` can pass over them; what spoils a
whole file is raised.

The files are read here rather than by `datasets`, which infers one schema for all rows: a key that only some
messages have would be filled with null in the others, and a broken row could not be named by its line.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from horizon_lm.config.dataset_info import PYTHON_STDLIB, SUFFIXES
from horizon_lm.data.compressed import (
    DAMAGED,
    damage,
    is_compressed,
    lines,
    open_bytes,
    read_whole,
    suffix_of,
)
from horizon_lm.data.csv_file import read_csv
from horizon_lm.data.parquet_file import read_parquet
from horizon_lm.errors import DataError
from horizon_lm.io.files import check_is_file
from horizon_lm.io.inside import check_files

_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
)

# What lies beside the data in the folder of a dataset.
_ABOUT = frozenset({"readme.md", "license.md", "license.txt", "dataset_info.json", "dataset_infos.json"})

Row = dict[str, Any] | DataError
PlacedRow = tuple[Row, str]


def list_files(name: str, *, follow_links: bool = False) -> list[Path]:
    """The readable files that `name` (a file, a folder or a glob) stands for, sorted.

    Files of other types inside a folder or a glob are passed over; naming one directly,
    or finding nothing, is a `DataError`. In a folder, so is what seems to be another form of what is there:
    a compressed file beside the same one that is not, and CSV beside JSON or parquet.
    What is found in a folder and leads out of it by a link is a `DataError` too, unless `follow_links`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise DataError(f"{name}: unknown file type {suffix_of(path)!r}", hint=_TYPES)
        return [path]
    folder = path
    if path.is_dir():
        found: Iterable[str] = _in_folder(path, follow_links=follow_links)
    elif glob.has_magic(name):
        folder = _before_magic(path)
        matches = (Path(match) for match in glob.iglob(str(path), recursive=True))
        found = (str(match) for match in matches if match.exists() and not match.is_dir())
    elif path.exists():
        raise DataError(f"{name} is a pipe or a device, not a file", hint="write it to a file first")
    else:
        raise DataError(
            f"{name} does not exist",
            hint=hint_for_names(name)
            or "a dataset is a local file, a folder, a glob, a name on the Hugging Face Hub, or "
            f"{PYTHON_STDLIB}; looked in {os.getcwd()}",
        )
    files = sorted(Path(file) for file in found if file.lower().endswith(SUFFIXES))
    files = [file for file in files if file.name.lower() not in _ABOUT] or files
    if path.is_dir():
        files = _one_form(files)
    if not files:
        raise DataError(f"{name} matches no file of a known type", hint=_TYPES)
    check_files(files, folder, follow_links=follow_links)
    return files


def _in_folder(path: Path, *, follow_links: bool) -> Iterator[str]:
    seen: set[str] = set()  # a link may lead back up
    for at, folders, names in os.walk(path, followlinks=follow_links):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (os.path.join(at, file) for file in names)


def _before_magic(path: Path) -> Path:
    """The folder that a glob begins in: its parts before the first with a `*`, `?` or `[`."""
    parts = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*parts)


def hint_for_names(name: str) -> str | None:
    """The way out for what LLaMA-Factory would look up, or for several paths in one text."""
    if os.path.isfile("data/dataset_info.json"):
        return "dataset_dir=data looks names up in data/dataset_info.json"
    return "several datasets are a list: datasets=[A, B]" if "," in name else None


def _one_form(files: list[Path]) -> list[Path]:
    there = set(files)
    files = [file for file in files if not (is_compressed(file) and file.with_suffix("") in there)]
    types = {file: suffix_of(file).removesuffix(".gz") for file in files}
    has_rows = any(type in (".jsonl", ".json", ".parquet") for type in types.values())
    return [file for file in files if not (has_rows and types[file] == ".csv")]


def read_file(path: Path) -> Iterator[PlacedRow]:
    """(row, place) for each row of one file."""
    last = None
    try:
        check_is_file(path)
        for row, place in _READERS[suffix_of(path).removesuffix(".gz")](path):
            last = place
            yield row, place
    except DAMAGED as error:
        raise damage(path, error, last) from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read, or that is none."""
    is_other = error.errno == errno.ENXIO  # see `check_is_file`
    hint = "leave it out, or write it to a file" if is_other else "check its permissions"
    return DataError(f"{path} cannot be read: {error.strerror or error}", hint=hint)


def _read_text(path: Path) -> Iterator[PlacedRow]:
    place = str(path)
    yield _row_or_fault(lambda: {"text": _decode(read_whole(path), place)}), place


def _read_json_lines(path: Path) -> Iterator[PlacedRow]:
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield _row_or_fault(lambda: _json_row(line, place)), place  # noqa: B023


def _json_row(line: bytes, place: str) -> dict[str, Any]:
    return _row(_parse(_decode(line, place).strip(), place), place)


def _read_json(path: Path) -> Iterator[PlacedRow]:
    """A `.json` file is one array of objects, or (as many tools write it) one object a line."""
    with open_bytes(path) as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(path)
        return
    rows = _parse(_decode(read_whole(path), str(path)), str(path))
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        yield _row_or_fault(lambda: _row(row, place)), place  # noqa: B023


def _row_or_fault(read: Callable[[], dict[str, Any]]) -> Row:
    try:
        return read()
    except DataError as error:
        return error


# One reader for each file type.
_READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
assert set(SUFFIXES) == {*_READERS, *(f"{suffix}.gz" for suffix in _READERS if suffix != ".parquet")}
_TYPES = f"one of {' '.join(_READERS)}; all but .parquet also as .gz"


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 else f"{place}:{error.lineno}"
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}",
            hint='a .jsonl file holds one object on each line, such as {"text": "..."}',
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not usable JSON: {error}") from error


def _row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} holds {kind(value)}, not an object", hint='write each row as {"text": "..."}'
        )
    return value


@dataclass(frozen=True)
class Media:
    """Stands for a picture, sound or the like in a row, which is not read. kind: `Image`, `Audio`, ..."""

    kind: str


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, Media):
        return value.kind
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a boolean", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example with iconv -t UTF-8",
        ) from error


def stdlib_files() -> list[Path]:
    """The standard library's own modules, in an order that mixes its folders.

    Sorted by a hash of each file's relative name, so that any prefix is a fair sample of
    the whole and the order depends on nothing but the Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        names += [path.relative_to(root).as_posix() for path in paths if not path.is_symlink()]
    if not names:
        raise DataError(f"{root} holds no Python sources", hint="set datasets=FILE")
    return [root / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


def read_stdlib() -> Iterator[PlacedRow]:
    for path in stdlib_files():
        yield {"text": path.read_text(encoding="utf-8", errors="ignore")}, str(path)
