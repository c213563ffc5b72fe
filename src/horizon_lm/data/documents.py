"""All datasets of a configuration as one sequence of examples, each with its place and its dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from horizon_lm.data import hub
from horizon_lm.data.formats import Example, Text, convert, detect, texts
from horizon_lm.data.sources import (
    PYTHON_STDLIB,
    SUFFIXES,
    PlacedRow,
    is_stdlib,
    list_files,
    read_file,
    read_stdlib,
    stdlib_files,
)
from horizon_lm.errors import DataError
from horizon_lm.hub_access import require_reachable

_SHOWN_BAD_ROWS = 5
_SPLIT = re.compile(r"[-_./](train|test|validation|valid|val|dev|eval)(?=[-_./0-9])")


@dataclass(frozen=True)
class Placed:
    """An example, where it stands, and the number of its dataset."""

    example: Example
    place: str
    dataset: int


class Documents:
    """The examples of `datasets`, in order; iterate as often as needed, each time afresh.

    datasets: entries of the configuration (`DatasetConfig`). A folder's files are read in the order of
    their names. `max_bytes` bounds the UTF-8 bytes of all texts together; a document that crosses it is
    cut there, a conversation is left out. Of the latest iteration: `num_empty` (texts that are empty,
    passed over), `bad_rows` (left out, with on_bad_row "skip") and `formats` (of each dataset, once seen).

    Iterating raises `DataError` for anything missing, empty, malformed or not text.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        max_bytes: int | None = None,
        *,
        on_bad_row: str = "raise",
        shards: ShardOrder | None = None,
    ) -> None:
        if not datasets:
            raise DataError("no dataset is given", hint=f"datasets=FILE, a folder, or {PYTHON_STDLIB}")
        self.datasets = list(datasets)
        self._max_bytes = max_bytes
        self._skip = on_bad_row == "skip"
        self._shards = shards
        self._begin()

    def _begin(self) -> None:
        self.num_empty = self.num_bad = 0
        self.bad_rows: list[str] = []
        self.formats: list[str | None] = [None] * len(self.datasets)

    def __iter__(self) -> Iterator[Placed]:
        self._begin()
        left = self._max_bytes
        for number, dataset in enumerate(self.datasets):
            found = False
            for example, place in self._examples(number, dataset):
                if isinstance(example, Text) and not example.text:
                    self.num_empty += 1
                    continue
                found = True
                size = sum(len(text.encode()) for text in texts(example)) if left is not None else 0
                if left is not None and size >= left:
                    if isinstance(example, Text):
                        cut = example.text.encode()[:left].decode(errors="ignore")
                        yield Placed(Text(cut), place, number)
                    return
                if left is not None:
                    left -= size
                yield Placed(example, place, number)
            if not found:
                raise DataError(f"{dataset.path} holds no text", hint=self._why_nothing())

    def _why_nothing(self) -> str:
        if self.bad_rows:
            return f"every row is bad; the first: {self.bad_rows[0]}"
        return "every file or row in it is empty"

    def _examples(self, number: int, dataset: Any) -> Iterator[tuple[Example, str]]:
        for row, place in rows(dataset, self._shards):
            try:
                yield self._example(row, place, number, dataset), place
            except DataError as error:
                self.skip(error)

    def _example(self, row: Any, place: str, number: int, dataset: Any) -> Example:
        if isinstance(row, DataError):
            raise row
        row = renamed(row, dataset)
        format = self.formats[number]
        if format is None:
            format = dataset.format if dataset.format != "auto" else None
            format = format or ("text" if dataset.text_column != "text" else detect(row, place))
            self.formats[number] = format
        return convert(row, format, place)

    def skip(self, error: DataError) -> None:
        """Leave a bad row out and remember it, or raise."""
        if not self._skip:
            raise error
        self.num_bad += 1
        if len(self.bad_rows) < _SHOWN_BAD_ROWS:
            self.bad_rows.append(error.message)

    def texts(self) -> Iterator[str]:
        """Every text of every example, for training a tokenizer."""
        for placed in self:
            yield from texts(placed.example)

    def fingerprint(self) -> str:
        """Of the content of all files and of how it is read; the same content elsewhere has the same."""
        digest = xxhash.xxh3_128()
        for dataset in self.datasets:
            reading = (dataset.format, sorted(dataset.columns.items()), dataset.text_column)
            digest.update(repr((reading, self._max_bytes, self._skip)).encode())
            for part in _content(dataset):
                digest.update(part)
        return digest.hexdigest()


def renamed(row: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """The row under our names: `columns`, an old name to a new one, and `text_column`."""
    names = dict(dataset.columns)
    if dataset.text_column != "text" and dataset.text_column in row and dataset.text_column not in names:
        names[dataset.text_column] = "text"
    if not names:
        return row
    kept = {key: value for key, value in row.items() if key not in names.values() or key in names}
    return {names.get(key, key): value for key, value in kept.items()}


@dataclass(frozen=True)
class ShardOrder:
    """Reads a stream: nothing is downloaded beforehand, and files come in an order by seed and epoch."""

    seed: int
    epoch: int

    def shuffled(self, files: list[Path]) -> list[Path]:
        order = np.random.default_rng([self.seed, self.epoch, 2]).permutation(len(files))
        return [files[i] for i in order]


def rows(dataset: Any, shards: ShardOrder | None = None) -> Iterator[PlacedRow]:
    """(row, place) of each row of one dataset, wherever it comes from."""
    opened = opened_dataset(dataset, streaming=shards is not None)
    if opened is not None:
        if shards is not None and hasattr(opened, "set_epoch"):  # a stream of the library
            opened = opened.shuffle(seed=shards.seed, buffer_size=1)  # of the shards' order alone
            opened.set_epoch(shards.epoch)
        yield from hub.rows_of(opened, dataset.path)
    elif is_stdlib(dataset.path):
        yield from read_stdlib()
    else:
        files = local_files(dataset)
        for path in shards.shuffled(files) if shards is not None else files:
            yield from read_file(path)


def opened_dataset(dataset: Any, *, streaming: bool = False) -> Any | None:
    """The object of the `datasets` library where it has to read; None for plain files."""
    path = Path(dataset.path).expanduser()
    if path.is_dir() and hub.is_saved_dataset(path):
        return hub.open_dataset(dataset)
    if (
        not path.exists()
        and hub.looks_like_repository(dataset.path, SUFFIXES)
        and not is_stdlib(dataset.path)
    ):
        return hub.open_dataset(dataset, streaming=streaming)
    return None


def local_files(dataset: Any) -> list[Path]:
    """The files of a dataset that is no Hub name. Raises DataError where there are none."""
    files = list_files(dataset.path)
    folder = Path(dataset.path).expanduser()
    found = {file: split_of(file.relative_to(folder)) for file in files} if folder.is_dir() else {}
    splits = set(found.values()) - {None}
    wanted = split_of(Path(dataset.split)) or dataset.split
    if "train" in splits and len(splits) > 1 or wanted in splits and wanted != "train":
        chosen = [file for file, split in found.items() if split == wanted]
        if chosen:
            return chosen
    elif dataset.split == "train":
        return files
    raise DataError(
        f"{dataset.path} has no split {dataset.split!r}",
        hint="a folder's splits are known by the names of its files, as in train.jsonl and test.jsonl; "
        "else give the files themselves as the path",
    )


def split_of(path: Path) -> str | None:
    """The split that the name of a file, or of a folder it lies in, speaks of; None for other names."""
    found = _SPLIT.search("/" + path.with_suffix("").as_posix().lower() + "/")
    return (
        {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}.get(
            found[1], found[1]
        )
        if found
        else None
    )


def check_exists(dataset: Any) -> None:
    """What can be told of a dataset without reading it. Raises DataError."""
    path = Path(dataset.path).expanduser()
    is_saved = path.is_dir() and hub.is_saved_dataset(path)
    is_remote = not path.exists() and hub.looks_like_repository(dataset.path, SUFFIXES)
    if is_stdlib(dataset.path) or is_saved:
        return
    if is_remote:
        require_reachable(dataset.path, "datasets", kind="dataset", error=DataError)
    else:
        local_files(dataset)


def _content(dataset: Any) -> Iterator[bytes]:
    """What the content of a dataset is known by: for files, a hash of each in order."""
    opened = opened_dataset(dataset)
    if opened is not None:
        yield hub.fingerprint(opened).encode()
        return
    for path in stdlib_files() if is_stdlib(dataset.path) else local_files(dataset):
        digest = xxhash.xxh3_128(path.suffix.lower().encode())
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
            ) from error
        yield digest.digest()
