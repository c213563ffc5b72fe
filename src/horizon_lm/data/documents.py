"""Examples of all configured datasets as one sequence, each with its place and dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from horizon_lm.config import DatasetConfig
from horizon_lm.config.dataset_info import PYTHON_STDLIB
from horizon_lm.config.preference import DataKind
from horizon_lm.data.examples import Example, Text, texts
from horizon_lm.data.file_content import FileHashes
from horizon_lm.data.formats import KIND_WORDS, convert, detect, kind_of
from horizon_lm.data.picture_rows import has_pictures, with_pictures
from horizon_lm.data.pictures import LEAVE_OUT, BadPictureError, folder_of, stamp
from horizon_lm.data.readers import Row
from horizon_lm.data.sources import ShardOrder, content, rows
from horizon_lm.errors import ConfigError, DataError

_SHOWN_BAD_ROWS = 5
_LOOKED_AT = 100  # rows of a dataset, for pictures
_OF_MESSAGES = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})
METHODS = {"documents": "sft", "pairs": "dpo", "labelled": "kto"}
_TAGGED_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
# Names of a message's role and content, by the tag that replaces them.
_OTHER_KEYS = (
    *(("role_tag", "role"), ("role_tag", "from")),
    *(("content_tag", "content"), ("content_tag", "value")),
)


@dataclass(frozen=True)
class Placed:
    """An example, its location for messages, and the number of its dataset."""

    example: Example
    place: str
    dataset: int


class Documents:
    """The examples of `datasets` in order; may be iterated repeatedly.

    max_bytes: limit for the UTF-8 bytes of all texts; a document that crosses it is cut, a conversation
    dropped. shards: read as a stream, in this order. Of the latest iteration: num_empty (texts, skipped),
    num_bad and bad_rows (first messages, with on_bad_row "skip"), the same of rows with a bad picture
    (on_bad_image), skipped_files (pictures of those rows, size and time of each), formats (of each dataset,
    once known). kind: the kind of data that the method takes; None:
    that of the first dataset, once known.

    Iterating raises `DataError` for data that is missing, empty, malformed or not text.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        max_bytes: int | None = None,
        *,
        on_bad_row: str = "raise",
        on_bad_image: str = "raise",
        shards: ShardOrder | None = None,
        kind: DataKind | None = None,
    ) -> None:
        if not datasets:
            raise DataError("no dataset given", hint=f"set datasets to a file, a folder or {PYTHON_STDLIB}")
        self.datasets = list(datasets)
        self._max_bytes = max_bytes
        self._skip, self._skips_pictures = on_bad_row == "skip", on_bad_image == "skip"
        self._folders = [folder_of(dataset.path, dataset.image_dir) for dataset in self.datasets]
        self._shards = shards
        self.kind, self._wanted = kind, kind
        self._begin()

    def _begin(self) -> None:
        self.num_empty = self.num_bad = 0
        self.bad_rows: list[str] = []
        self.num_bad_pictures = 0
        self.bad_pictures: list[str] = []
        self.skipped_files: dict[str, list[int] | None] = {}
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
                raise self._nothing_in(dataset.path)

    def _nothing_in(self, path: str) -> DataError:
        if self.bad_rows:
            message = f"{path} holds no text: every row is bad; the first: {self.bad_rows[0]}"
            return DataError(message, hint="correct the rows, or set `format` or `columns` of this dataset")
        return DataError(
            f"{path} holds no text: every file or row in it is empty",
            hint="check the path, `split` and `text_column` of this dataset",
        )

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
            format = format or ("text" if dataset.text_column != "text" else detect(row, place, self._wanted))
            self._check_kind(format, number)
            self.formats[number] = format
        if kind_of(format) != "documents" and has_pictures(row):
            raise _preferred_pictures(place)
        return with_pictures(convert(row, format, place), row, self._folders[number], place, format)

    def _check_kind(self, format: str, number: int) -> None:
        """Raise DataError if a dataset is of another kind than the method takes, or than those before it."""
        kind = kind_of(format)
        if self._wanted is not None and kind != self._wanted:
            raise DataError(
                f"{self.datasets[number].path} has the format {format}, which is {KIND_WORDS[kind]}; "
                f"the method trains on {KIND_WORDS[self._wanted]}",
                hint=f"set method: {METHODS[kind]}, or another format",
            )
        if self.kind is not None and kind != self.kind:
            raise two_kinds(self.datasets[0].path, self.kind, self.datasets[number].path, kind)
        self.kind = kind

    def skip(self, error: DataError) -> None:
        """Count a bad row and skip it, or raise."""
        if isinstance(error, BadPictureError):
            if not self._skips_pictures:
                raise error
            self.num_bad_pictures += 1
            self.skipped_files |= {path: stamp(path) for path in error.files}
            if len(self.bad_pictures) < _SHOWN_BAD_ROWS:
                self.bad_pictures.append(error.message)
            return
        if not self._skip:
            raise error
        self.num_bad += 1
        if len(self.bad_rows) < _SHOWN_BAD_ROWS:
            self.bad_rows.append(error.message)

    def texts(self) -> Iterator[str]:
        """Yield every text, for training a tokenizer."""
        for placed in self:
            yield from texts(placed.example)

    @property
    def picture_folders(self) -> list[str]:
        """Where relative paths of pictures start, by dataset."""
        return [str(folder) for folder in self._folders]

    def first_with_pictures(self) -> str | None:
        """Return the place of the first row with pictures among the first of each dataset, if any."""
        for number, dataset in enumerate(self.datasets):
            for row, place in islice(rows(dataset, self._shards), _LOOKED_AT):
                if isinstance(row, DataError):
                    continue
                row = renamed(row, dataset)
                format = dataset.format if dataset.format != "auto" else self.formats[number]
                with suppress(DataError):
                    format = format or detect(row, place)
                if format not in (None, "text") and has_pictures(row):
                    return place
        return None

    def fingerprint(self, cache_dir: Path | None = None) -> str:
        """Hash the content of all files and how it is read; paths do not matter.

        cache_dir: folder of cached file hashes; None: read all files.
        """
        digest, hashes = xxhash.xxh3_128(), FileHashes(cache_dir)
        for dataset in self.datasets:
            reading: list[Any] = [dataset.format, sorted(dataset.columns.items()), dataset.text_column]
            # Only if set, so that earlier fingerprints stay valid.
            reading += [sorted(dataset.tags.items())] if dataset.tags else []
            reading += [dataset.max_samples] if dataset.max_samples else []
            reading += ["on_bad_image: skip"] if self._skips_pictures else []
            digest.update(repr((reading, self._max_bytes, self._skip)).encode())
            for part in content(dataset, hashes):
                digest.update(part)
        hashes.save()
        return digest.hexdigest()


def _preferred_pictures(place: str) -> ConfigError:
    return ConfigError(
        f"{place} is a preference with pictures, which is not supported",
        hint=f"set method: sft, or leave pictures out with {LEAVE_OUT}",
    )


def two_kinds(first: str, its_kind: str, second: str, kind: str) -> DataError:
    """Return the error for two datasets of one run that differ in kind."""
    return DataError(
        f"{first} holds {KIND_WORDS[its_kind]}, {second} {KIND_WORDS[kind]}: a run trains on one kind",
        hint="train on them in runs of their own, or set `format` or `columns` of one",
    )


def renamed(row: dict[str, Any], dataset: DatasetConfig) -> dict[str, Any]:
    """Rename columns by `columns` (old name to new name or null), `text_column` and `tags`."""
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
    """Rename keys and roles of a message, or of a list of them, to ours by `tags`; return other values
    unchanged."""
    if isinstance(value, dict):
        return tagged([value], tags)[0]
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
