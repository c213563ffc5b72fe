"""Rows of a CSV file: the first line names the columns, and every cell is text.

Quotes, delimiters and line ends inside cells are read as Python's `csv` and spreadsheets write them. A row
that cannot be read comes as a DataError in its place, so that `on_bad_row: skip` can pass over it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from horizon_lm.data.compressed import LARGEST_ROW, lines
from horizon_lm.errors import DataError

_BOM = "\ufeff"
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(path: Path) -> Iterator[tuple[dict[str, str] | DataError, str]]:
    """(row, place) of each row; rows are counted without the header. Raises DataError for a bad header."""
    reader = csv.reader(_text(path), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        place = f"{path}: row {number + 1}" if header is not None else f"{path}: the header"
        try:
            cells = _next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = DataError(
                f"{place} is not valid CSV: {error}", hint='put a cell with quotes in it as "like ""this"""'
            )
            if header is None:
                raise fault from error
            number += 1
            yield fault, place
            continue
        if not cells:  # a blank line
            continue
        if header is None:
            header = _header(cells, place)
            continue
        number += 1
        yield _row(header, cells, place), place


def _text(path: Path) -> Iterator[str]:
    """Lines as text. Bytes that are not UTF-8 become lone surrogates, which `_row` finds in their cell."""
    for number, line in enumerate(lines(path)):
        text = line.decode("utf-8", "surrogateescape")
        yield text if number else text.removeprefix(_BOM)


def _next(reader: Iterator[list[str]]) -> list[str]:
    """The next row, with cells as long as documents are: the limit of `csv` is 128 KiB, for all its users."""
    before = csv.field_size_limit(LARGEST_ROW)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _header(cells: list[str], place: str) -> list[str]:
    _check_text(cells, place)
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise DataError(f"{place} names the column {twice[0]!r} twice", hint="rename one of them")
    for mark, name in _OTHER_DELIMITERS.items():
        if len(cells) == 1 and mark in cells[0]:
            raise DataError(
                f"{place} is one column, {cells[0][:60]!r}: it seems to be divided by {name}",
                hint="save it with commas between the cells",
            )
    return cells


def _row(header: list[str], cells: list[str], place: str) -> dict[str, str] | DataError:
    if len(cells) != len(header):
        return DataError(
            f"{place} has {len(cells)} cells, and the header names {len(header)} columns",
            hint="put a cell with commas or line ends in it in double quotes",
        )
    try:
        _check_text(cells, place)
    except DataError as error:
        return error
    return dict(zip(header, cells, strict=True))


def _check_text(cells: list[str], place: str) -> None:
    for cell in cells:
        if cell.isascii():
            continue
        for character in cell:
            if "\udc80" <= character <= "\udcff":
                raise DataError(
                    f"{place} is not UTF-8: byte {ord(character) - 0xDC00:#04x}",
                    hint="convert it first, for example with iconv -t UTF-8",
                )
