"""Where text comes from: files, folders, globs, and Python's own standard library.

A source is read lazily, one document (a `str`) at a time, and every fault is a
`DataError` that names the file and, where there is one, the line or row.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from horizon_lm.errors import DataError

PYTHON_STDLIB = "python-stdlib"

_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
)


class Documents:
    """The documents of `datasets`, in order; iterate as often as needed, each time afresh.

    Each dataset has a `path` (a file, a folder, a glob, or `python-stdlib`) and may have a
    `text_column` (default "text") and `columns`, a map {name in the file: name here}.
    A folder's files are read in the order of their names. `max_bytes` bounds the UTF-8
    bytes of all documents together; the document that crosses it is cut there. Empty
    texts are passed over; `num_empty` counts those of the latest iteration.

    Iterating raises `DataError` for anything missing, empty, malformed or not text.
    """

    def __init__(self, datasets: Sequence[Any], max_bytes: int | None = None) -> None:
        if not datasets:
            raise DataError("no dataset is given", hint=f"datasets=FILE, a folder, or {PYTHON_STDLIB}")
        self._datasets = list(datasets)
        self._max_bytes = max_bytes
        self.num_empty = 0

    def __iter__(self) -> Iterator[str]:
        self.num_empty = 0
        left = self._max_bytes
        for dataset in self._datasets:
            found = False
            for text, place in _documents_of(dataset):
                if not text:
                    self.num_empty += 1
                    continue
                found = True
                size = _utf8_size(text, place)
                if left is not None and size >= left:
                    yield text.encode("utf-8")[:left].decode("utf-8", errors="ignore")
                    return
                if left is not None:
                    left -= size
                yield text
            if not found:
                raise DataError(f"{dataset.path} holds no text", hint="every file or row in it is empty")


def _documents_of(dataset: Any) -> Iterator[tuple[str, str]]:
    """(text, place it came from) for each document of one dataset."""
    name = str(dataset.path)
    if name == PYTHON_STDLIB and not os.path.exists(name):
        yield from _read_stdlib()
        return
    column = _column_in_file(dataset)
    for path in list_files(name):
        yield from read_file(path, column)


def _column_in_file(dataset: Any) -> str:
    """The name, inside the file, of the column that holds the text."""
    column = getattr(dataset, "text_column", None) or "text"
    renamed = getattr(dataset, "columns", None) or {}
    return next((old for old, new in renamed.items() if new == column), column)


def list_files(name: str) -> list[Path]:
    """The readable files that `name` (a file, a folder or a glob) stands for, sorted.

    Files of other types inside a folder or a glob are passed over; naming one directly,
    or finding nothing, is a `DataError`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{name}: unknown file type {path.suffix!r}", hint=f"one of {' '.join(SUFFIXES)}")
        return [path]
    if path.is_dir():
        found: Iterable[str] = (os.path.join(at, file) for at, _, names in os.walk(path) for file in names)
    elif glob.has_magic(name):
        found = (match for match in glob.iglob(str(path), recursive=True) if os.path.isfile(match))
    else:
        raise DataError(
            f"{name} does not exist",
            hint=f"a dataset is a local file, a folder, a glob, or {PYTHON_STDLIB}; looked in {os.getcwd()}",
        )
    files = sorted(Path(file) for file in found if file.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(f"{name} matches no file of a known type", hint=f"one of {' '.join(SUFFIXES)}")
    return files


def read_file(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """(text, place) for each document of one file; `column` matters to files of rows only."""
    try:
        yield from _READERS[path.suffix.lower()](path, column)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, column: str) -> Iterator[tuple[str, str]]:
    yield _decode(path.read_bytes(), str(path)), str(path)


def _read_json_lines(path: Path, column: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            text = _decode(line, place).strip()
            if text:
                yield _text_of(_parse(text, place), column, place), place


def _read_json(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """A `.json` file is one array of objects, or (as many tools write it) one object a line."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(path, column)
        return
    rows = _parse(_decode(path.read_bytes(), str(path)), str(path))
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        yield _text_of(row, column, place), place


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _missing_column(column, names, str(path))
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    place = f"{path}: row {number}"
                    yield _checked_text(value, column, place), place
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


# One reader for each file type: (path, column) -> (text, place) of each document.
_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, str]]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)


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


def _text_of(row: Any, column: str, place: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{place} holds {_kind(row)}, not an object", hint='write each row as {"text": "..."}'
        )
    if column not in row:
        raise _missing_column(column, list(row), place)
    return _checked_text(row[column], column, place)


def _checked_text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} holds {_kind(value)}, not text")
    return value


def _missing_column(column: str, seen: list[str], place: str) -> DataError:
    return DataError(
        f"{place} has no column {column!r}; it has {', '.join(map(repr, seen)) or 'none'}",
        hint="set text_column of this dataset to the one that holds the text",
    )


def _kind(value: Any) -> str:
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


def _utf8_size(text: str, place: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: character {error.start} is half of a surrogate pair") from error


def _read_stdlib() -> Iterator[tuple[str, str]]:
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
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield (root / name).read_text(encoding="utf-8", errors="ignore"), str(root / name)
