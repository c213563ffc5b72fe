"""All datasets of a configuration as one sequence of examples, each with its place and its dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from horizon_lm.config.dataset_info import PYTHON_STDLIB, SUFFIXES, is_stdlib
from horizon_lm.data import hub
from horizon_lm.data.arrow_rows import ArrowRows
from horizon_lm.data.file_hash import FileHashes
from horizon_lm.data.formats import Example, Text, convert, detect, texts
from horizon_lm.data.sources import (
    PlacedRow,
    list_files,
    read_file,
    read_stdlib,
    stdlib_files,
)
from horizon_lm.errors import DataError
from horizon_lm.io.hub import require_reachable

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

    def fingerprint(self, cache_dir: Path | None = None) -> str:
        """Of the content of all files and of how it is read; the same content elsewhere has the same.

        cache_dir: where the hashes of files are kept; None: all are read.
        """
        digest, hashes = xxhash.xxh3_128(), FileHashes(cache_dir)
        for dataset in self.datasets:
            reading = [dataset.format, sorted(dataset.columns.items()), dataset.text_column]
            # Named only where they are set, so that what was read without them is the same as it was.
            reading += [sorted(dataset.tags.items())] if dataset.tags else []
            reading += [dataset.max_samples] if dataset.max_samples else []
            digest.update(repr((reading, self._max_bytes, self._skip)).encode())
            for part in _content(dataset, hashes):
                digest.update(part)
        hashes.save()
        return digest.hexdigest()


def renamed(row: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """The row under our names: `columns`, an old name to a new one or to null, `text_column` and `tags`."""
    names = dict(dataset.columns)
    if dataset.text_column != "text" and dataset.text_column in row and dataset.text_column not in names:
        names[dataset.text_column] = "text"
    if names:
        kept = {key: value for key, value in row.items() if key not in names.values() or key in names}
        new = {key: names.get(key, key) for key in kept}
        row = {name: kept[key] for key, name in new.items() if name is not None}
    if dataset.tags:
        row = {k: tagged(v, dataset.tags) if k in _OF_MESSAGES else v for k, v in row.items()}
    return row


_OF_MESSAGES = frozenset({"messages", "conversations", "prompt", "completion"})
_TAGGED_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


def tagged(value: Any, tags: dict[str, str]) -> Any:
    """A list of messages with our keys and roles in place of those that `tags` names; else `value`."""
    if not isinstance(value, list):
        return value
    roles = {tags[tag]: role for tag, role in _TAGGED_ROLES.items() if tag in tags}
    keys = {tags[tag]: tag.removesuffix("_tag") for tag in ("role_tag", "content_tag") if tag in tags}
    hidden = {name for tag, name in _OTHER_KEYS if tag in tags} - keys.keys()

    def message(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        new = {keys.get(key, key): part for key, part in entry.items() if key not in hidden}
        for key in ("role", "from"):
            if isinstance(new.get(key), str):
                new[key] = roles.get(new[key], new[key])
        return new

    return [message(entry) for entry in value]


# What a message's role and content are called where no tag says otherwise.
_OTHER_KEYS = (
    *(("role_tag", "role"), ("role_tag", "from")),
    *(("content_tag", "content"), ("content_tag", "value")),
)


@dataclass(frozen=True)
class ShardOrder:
    """Reads a stream: nothing is downloaded beforehand, and files come in an order by seed and epoch.

    is_fixed: in their own order instead.
    """

    seed: int
    epoch: int
    is_fixed: bool = False

    def shuffled(self, files: list[Path]) -> list[Path]:
        if self.is_fixed:
            return files
        order = np.random.default_rng([self.seed, self.epoch, 2]).permutation(len(files))
        return [files[i] for i in order]


def rows(dataset: Any, shards: ShardOrder | None = None) -> Iterator[PlacedRow]:
    """(row, place) of each row of one dataset, wherever it comes from.

    max_samples: the first ones in the dataset's own order, which a stream then keeps in every epoch.
    """
    if dataset.max_samples is not None:
        own_order = None if shards is None else ShardOrder(shards.seed, shards.epoch, is_fixed=True)
        yield from islice(_all_rows(dataset, own_order), dataset.max_samples)
    else:
        yield from _all_rows(dataset, shards)


def _all_rows(dataset: Any, shards: ShardOrder | None) -> Iterator[PlacedRow]:
    opened = opened_dataset(dataset, streaming=shards is not None)
    if opened is not None:
        if opened.is_stream and shards is not None and not shards.is_fixed:
            opened = opened.shuffled(shards.seed, shards.epoch)
        yield from opened
    elif is_stdlib(dataset.path):
        yield from read_stdlib()
    else:
        files = local_files(dataset)
        for path in shards.shuffled(files) if shards is not None else files:
            yield from read_file(path)


def opened_dataset(dataset: Any, *, streaming: bool = False) -> ArrowRows | None:
    """The rows where the `datasets` library has to read them; None for plain files."""
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
    files = list_files(dataset.path, follow_links=dataset.follow_links)
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


def _content(dataset: Any, hashes: FileHashes) -> Iterator[bytes]:
    """What the content of a dataset is known by: a hash of each of its files in order."""
    opened = opened_dataset(dataset)
    if opened is not None:
        yield from opened.content(hashes)
    else:
        yield from hashes.of(stdlib_files() if is_stdlib(dataset.path) else local_files(dataset))
