"""Rows of a parquet file, a few at a time, and what Arrow's rows are as ours.

A few hundred bytes of parquet can hold many gigabytes: a value that is written once and named by each row. So
as many rows are decoded at a time as have room even if each has the largest value of its columns, and a file
that becomes too many times its size is refused (`check_expansion`), before a row of it is used: decoding is
quick, and tokenising is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horizon_lm.data.compressed import FREE_EXPANSION, LARGEST_ROW, check_expansion
from horizon_lm.errors import DataError

_MOST_ROWS = 64  # decoded at a time; more is not faster
_BYTES = frozenset({"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"})
_ONE_BY_ONE = frozenset({"PLAIN", "RLE", "BIT_PACKED"})  # encodings that write each value out


def read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, place) of each row. Raises DataError for a file that cannot be read or is too large decoded."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in _batches(path, file):
                for row in batch.to_pylist():
                    number += 1
                    yield without_filling(row), f"{path}: row {number}"
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        reason = str(error).strip() or "memory ran out"
        raise DataError(
            f"{path} is not a readable parquet file: {reason.splitlines()[0][:300]}", hint="write it again"
        ) from error


def _batches(path: Path, file: Any) -> Iterator[Any]:
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


def _largest_row(group: Any) -> int:
    """Bytes of a row of a row group that has the largest value its columns can have, where values are not
    written out one by one."""
    largest = 1
    for index in range(group.num_columns):
        column = group.column(index)
        if column.physical_type in _BYTES and not _ONE_BY_ONE.issuperset(column.encodings):
            in_a_row = -(-column.num_values // max(1, group.num_rows))
            largest += max(0, column.total_uncompressed_size) * max(1, in_a_row)
    return largest


def _decoded_size(batch: Any) -> int:
    """Bytes of the batch with every value written out."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return sum(column.nbytes for column in columns)


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's, without the nulls inside its values.

    A column has one type there: a key that one object has is null in all others, such as an argument of
    another tool's call.
    """
    return {key: _pruned(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    return [_pruned(entry) for entry in value] if isinstance(value, list) else value
