"""All datasets of a configuration as one sequence of examples, each with its place and its dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from horizon_lm.config import DatasetConfig
from horizon_lm.config.dataset_info import PYTHON_STDLIB
from horizon_lm.data.file_content import FileHashes
from horizon_lm.data.formats import Example, Text, convert, detect, texts
from horizon_lm.data.readers import Row
from horizon_lm.data.sources import ShardOrder, content, rows
from horizon_lm.errors import DataError

_SHOWN_BAD_ROWS = 5
_OF_MESSAGES = frozenset({"messages", "conversations", "prompt", "completion"})
_TAGGED_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
# What a message's role and content are called where no tag says otherwise.
_OTHER_KEYS = (
    *(("role_tag", "role"), ("role_tag", "from")),
    *(("content_tag", "content"), ("content_tag", "value")),
)


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
        datasets: Sequence[DatasetConfig],
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

    def _examples(self, number: int, dataset: DatasetConfig) -> Iterator[tuple[Example, str]]:
        for row, place in rows(dataset, self._shards):
            try:
                yield self._example(row, place, number, dataset), place
            except DataError as error:
                self.skip(error)

    def _example(self, row: Row, place: str, number: int, dataset: DatasetConfig) -> Example:
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
            reading: list[Any] = [dataset.format, sorted(dataset.columns.items()), dataset.text_column]
            # Named only where they are set, so that what was read without them is the same as it was.
            reading += [sorted(dataset.tags.items())] if dataset.tags else []
            reading += [dataset.max_samples] if dataset.max_samples else []
            digest.update(repr((reading, self._max_bytes, self._skip)).encode())
            for part in content(dataset, hashes):
                digest.update(part)
        hashes.save()
        return digest.hexdigest()


def renamed(row: dict[str, Any], dataset: DatasetConfig) -> dict[str, Any]:
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
