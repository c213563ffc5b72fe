"""Readers of single files: text, JSON lines, JSON, CSV and parquet; all but parquet may be gzipped.

Each yields (row, place) lazily; a place is a location for messages, such as `a.jsonl:3`. A text file is one
row with the column `text`. An unreadable row is yielded as a `DataError`, so that `on_bad_row: skip` can skip
it; an unreadable file raises.

`datasets` is not used here: it infers one schema for all rows, which fills keys that only some messages have
with null, and it cannot name a bad row's line.

A few hundred bytes of parquet can hold many gigabytes, as each row may refer to one large value. So batches
are small enough to fit if every row holds the largest value of each column, and a file that expands too far
is rejected (`check_expansion`) before its rows are used.
"""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon_lm.config.dataset_info import SUFFIXES
from horizon_lm.data.file_content import (
    DAMAGED,
    FREE_EXPANSION,
    LARGEST_ROW,
    check_expansion,
    damage,
    lines,
    open_bytes,
    read_whole,
    suffix_of,
)
from horizon_lm.errors import DataError
from horizon_lm.io.files import check_is_file

if TYPE_CHECKING:
    import pyarrow.parquet

_BOM = "\ufeff"
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_MOST_ROWS = 64  # decoded at once; more is not faster
_BYTES = frozenset({"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"})
_ONE_BY_ONE = frozenset({"PLAIN", "RLE", "BIT_PACKED"})  # encodings that write out each value

Row = dict[str, Any] | DataError
PlacedRow = tuple[Row, str]


@dataclass(frozen=True)
class Media:
    """Media in a row, which are not decoded. kind: `Image`, `Audio`, ... value: of an `Image`, as stored."""

    kind: str
    value: Any = field(default=None, repr=False, compare=False)


def read_file(path: Path) -> Iterator[PlacedRow]:
    """Yield (row, place) for each row of one file."""
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
    """Return the error for a path that cannot be opened, or is not a file."""
    is_other = error.errno == errno.ENXIO  # see `check_is_file`
    hint = "remove it, or save its content as a file" if is_other else "check its permissions"
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
    """Read an array of objects or, as many tools write `.json`, one object per line."""
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


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 else f"{place}:{error.lineno}"
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}",
            hint='write one object per line in a .jsonl file, such as {"text": "..."}',
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not usable JSON: {error}", hint='write each row as {"text": "..."}'
        ) from error


def _row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} holds {kind(value)}, not an object", hint='write each row as {"text": "..."}'
        )
    return value


def _conversion(start: bytes = b"") -> str:
    """Return the hint for data that begins with `start` and is not UTF-8."""
    if start == b"\x1f\x8b":
        return "it is compressed with gzip: add .gz to its name"
    encoding = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    # Without -f, iconv expects the locale's encoding, mostly UTF-8 again.
    return f"convert it, for example: iconv -f {encoding} -t UTF-8 FILE > NEW"


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint=_conversion(data[:2]),
        ) from error


def kind(value: Any) -> str:
    """Name the type of a JSON value."""
    if isinstance(value, Media):
        return value.kind
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a boolean", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def read_csv(path: Path) -> Iterator[tuple[dict[str, str] | DataError, str]]:
    """Yield (row, place); the header is not counted. Raises DataError for a bad header."""
    reader = csv.reader(_csv_lines(path), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        place = f"{path}: row {number + 1}" if header is not None else f"{path}: the header"
        try:
            cells = _next_cells(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = DataError(
                f"{place} is not valid CSV: {error}", hint='write quotes inside a cell as "like ""this"""'
            )
            if header is None:
                raise fault from error
            number += 1
            yield fault, place
            continue
        if not cells:  # a blank line
            continue
        if header is None:
            header = _csv_header(cells, place)
            continue
        number += 1
        yield _csv_row(header, cells, place), place


def _csv_lines(path: Path) -> Iterator[str]:
    """Decode lines. Bytes that are not UTF-8 become lone surrogates, which `_check_utf8` finds."""
    for number, line in enumerate(lines(path)):
        text = line.decode("utf-8", "surrogateescape")
        yield text if number else text.removeprefix(_BOM)


def _next_cells(reader: Iterator[list[str]]) -> list[str]:
    """Read a row with cells of any document's length: the limit of `csv`, set process-wide, is 128 KiB."""
    before = csv.field_size_limit(LARGEST_ROW)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _csv_header(cells: list[str], place: str) -> list[str]:
    _check_utf8(cells, place)
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise DataError(f"{place} has two columns named {twice[0]!r}", hint="rename one of them")
    for mark, name in _OTHER_DELIMITERS.items():
        if len(cells) == 1 and mark in cells[0]:
            raise DataError(
                f"{place} has one column, {cells[0][:60]!r}, which seems to be separated by {name}",
                hint="save it with commas as separators",
            )
    return cells


def _csv_row(header: list[str], cells: list[str], place: str) -> dict[str, str] | DataError:
    if len(cells) != len(header):
        return DataError(
            f"{place} has {len(cells)} cells, the header {len(header)} columns",
            hint="quote cells that contain commas or line breaks",
        )
    try:
        _check_utf8(cells, place)
    except DataError as error:
        return error
    return dict(zip(header, cells, strict=True))


def _check_utf8(cells: list[str], place: str) -> None:
    for cell in cells:
        if cell.isascii():
            continue
        for character in cell:
            if "\udc80" <= character <= "\udcff":
                raise DataError(
                    f"{place} is not UTF-8: byte {ord(character) - 0xDC00:#04x}",
                    hint=_conversion(),
                )


def read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (row, place). Raises DataError for a file that is unreadable or expands too far."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in _parquet_batches(path, file):
                for row in batch.to_pylist():
                    number += 1
                    yield without_filling(row), f"{path}: row {number}"
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        reason = str(error).strip() or "memory ran out"
        raise DataError(
            f"{path} is not a readable parquet file: {reason.splitlines()[0][:300]}",
            hint="write it again",
        ) from error


def _parquet_batches(path: Path, file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    decoded = 0
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        largest = _largest_row(about)
        count = max(1, min(_MOST_ROWS, LARGEST_ROW // largest))
        is_counted = largest * about.num_rows > FREE_EXPANSION
        if is_counted:
            for batch in file.iter_batches(count, row_groups=[group]):
                decoded += _decoded_size(batch)
                check_expansion(path, decoded)
        for batch in file.iter_batches(count, row_groups=[group]):
            if not is_counted:
                decoded += _decoded_size(batch)
                check_expansion(path, decoded)
            yield batch


def _largest_row(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """Bound the bytes of a row: the largest value of each column whose encoding does not write out all."""
    largest = 1
    for index in range(group.num_columns):
        column = group.column(index)
        if column.physical_type in _BYTES and not _ONE_BY_ONE.issuperset(column.encodings):
            in_a_row = -(-column.num_values // max(1, group.num_rows))
            largest += max(0, column.total_uncompressed_size) * max(1, in_a_row)
    return largest


def _decoded_size(batch: pyarrow.RecordBatch) -> int:
    """Return the bytes of a batch with every value written out."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return sum(column.nbytes for column in columns)


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """Remove nulls inside the values of an Arrow row.

    An Arrow column has one type: a key that one object has is null in all others, such as the argument of
    another tool's call.
    """
    return {key: _pruned(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    return [_pruned(entry) for entry in value] if isinstance(value, list) else value


# By file type.
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
TYPES = f"use one of {' '.join(_READERS)}; all but .parquet may be gzipped (.gz)"
