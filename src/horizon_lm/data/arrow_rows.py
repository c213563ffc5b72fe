"""Rows of an object of the `datasets` library, as plain values of Python.

Formats that were set (`set_format`) are left aside. Pictures, sound and the like are not decoded, which takes
a library for each: a column of them is there by its name alone, so that one beside text is no hindrance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from horizon_lm.data.file_hash import FileHashes
from horizon_lm.data.parquet_file import without_filling
from horizon_lm.data.sources import Media, PlacedRow
from horizon_lm.errors import DataError

_MEDIA = frozenset({"Audio", "Image", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure"})
_ROWS_AT_A_TIME = 10  # as the library reads them


class ArrowRows:
    """The rows of a `datasets.Dataset`, or of an `IterableDataset` (a stream).

    name: for places and errors. The object must not have been changed since it was loaded (`map`, `select`).
    """

    def __init__(self, dataset: Any, name: str) -> None:
        import datasets

        self._name = name
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        features = dict(dataset.features or {})
        if not self.is_stream and not dataset.format["output_all_columns"]:
            features = {column: features[column] for column in dataset.format["columns"]}
        kinds = {column: _kind(feature) for column, feature in features.items()}
        self._media = {column: Media(kind) for column, kind in kinds.items() if kind}
        self._features = datasets.Features(
            {column: _undecoded(feature) for column, feature in features.items() if not kinds[column]}
        )
        if self.is_stream:
            has_media = any(_undecoded(feature) != feature for feature in features.values())
            self._dataset = dataset.decode(False) if has_media else dataset
        else:
            self._dataset = dataset.with_format("arrow", columns=list(self._features))

    def shuffled(self, seed: int, epoch: int) -> ArrowRows:
        """A stream with its shards (not its rows) in an order by seed and epoch."""
        self._dataset = self._dataset.shuffle(seed=seed, buffer_size=1)
        self._dataset.set_epoch(epoch)
        return self

    def __iter__(self) -> Iterator[PlacedRow]:
        """(row, place) of each row. Raises DataError for damaged data."""
        number = 0
        try:
            for row in self._dataset if self.is_stream else self._stored():
                number += 1
                decoded = self._features.decode_example({k: row[k] for k in self._features if k in row})
                yield without_filling({**row, **decoded, **self._media}), f"{self._name}: row {number}"
        except DataError:
            raise
        except Exception as error:  # of Arrow, of the library, of the network in a stream
            after = f"after row {number}" if number else "from its first row on"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise DataError(
                f"{self._name} cannot be read {after}: {reason}", hint="write or download it again"
            ) from error

    def _stored(self) -> Iterator[dict[str, Any]]:
        """Each part is checked before it is read: Arrow follows a damaged offset to wherever it points."""
        if not self._features:
            yield from ({} for _ in range(len(self._dataset)))
            return
        for table in self._dataset.iter(_ROWS_AT_A_TIME):
            table.validate(full=True)
            yield from table.to_pylist()

    def content(self, hashes: FileHashes) -> Iterator[bytes]:
        """What the rows are known by: the bytes of the files they lie in, and how these are read."""
        dataset = self._dataset
        shown = [self._features.to_dict(), sorted(self._media)]
        yield json.dumps([len(dataset), str(dataset.split), shown], sort_keys=True, default=str).encode()
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        yield from hashes.of(files, prefix="arrow") if files else _in_memory(dataset.data.table)


def _in_memory(table: Any) -> Iterator[bytes]:
    for batch in table.to_batches():
        yield xxhash.xxh3_128(batch.serialize()).digest()


def _kind(feature: Any) -> str | None:
    """The name of what a column holds, if that is media alone: Image for pictures and lists of them."""
    if hasattr(feature, "feature"):
        return _kind(feature.feature)
    name = type(feature).__name__
    return name if name in _MEDIA else None


def _undecoded(feature: Any) -> Any:
    """The feature with the media in it left as they are stored."""
    if isinstance(feature, dict):
        return {key: _undecoded(part) for key, part in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if type(feature).__name__ in _MEDIA:
        return dataclasses.replace(feature, decode=False)
    return feature
