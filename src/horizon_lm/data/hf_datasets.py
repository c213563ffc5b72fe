"""Datasets that the `datasets` library reads: names on the Hugging Face Hub, and folders it has saved.

Rows come as plain values of Python. Formats that were set (`set_format`) are left aside. Pictures, sound and
the like are not decoded, which takes a library for each: a column of them is there by its name alone, so that
one beside text is no hindrance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from horizon_lm.config import DatasetConfig
from horizon_lm.config.dataset_info import SUFFIXES
from horizon_lm.data.file_content import FileHashes
from horizon_lm.data.readers import Media, PlacedRow, without_filling
from horizon_lm.errors import DataError
from horizon_lm.io.files import read_bytes
from horizon_lm.io.hub import require_reachable
from horizon_lm.io.inside import check_files
from horizon_lm.words import size

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_JSON = 1 << 26
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MEDIA = frozenset({"Audio", "Image", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure"})
_ROWS_AT_A_TIME = 10  # as the library reads them


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def looks_like_repository(name: str) -> bool:
    """Whether `name`, which is no local path, may be a dataset on the Hub: owner/name or name."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.lower().endswith(SUFFIXES)


def open_dataset(settings: DatasetConfig, *, streaming: bool = False) -> ArrowRows:
    """The rows of a saved folder or a Hub name, in the split that is asked for.

    settings: an entry of `datasets` in the configuration. Scripts are never run. Raises DataError.
    """
    path = Path(settings.path).expanduser()
    require_reachable(settings.path, "datasets", kind="dataset", error=DataError)
    import datasets

    in_files = {} if streaming else {"keep_in_memory": False}
    try:
        with quiet():
            if path.is_dir():
                return ArrowRows(_saved(path, settings), settings.path)
            loaded = datasets.load_dataset(
                settings.path,
                name=settings.name,
                split=settings.split,
                revision=settings.revision,
                streaming=streaming,
                **in_files,
            )
            return ArrowRows(loaded, settings.path)
    except DataError:
        raise
    except Exception as error:  # the library and the Hub's client raise many kinds; each means "no data"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"{settings.path} is no local file, and could not be read as a dataset of the Hub: {reason}"
            if not path.exists()
            else f"{settings.path} could not be read as a saved dataset: {reason}",
            hint=(hint_for_names(settings.path) if not path.exists() else None)
            or "check the path or the name, `name` (the dataset's configuration), `split` and the network",
        ) from error


def hint_for_names(name: str) -> str | None:
    """The way out for what LLaMA-Factory would look up, or for several paths in one text."""
    if os.path.isfile("data/dataset_info.json"):
        return "dataset_dir=data looks names up in data/dataset_info.json"
    return "several datasets are a list: datasets=[A, B]" if "," in name else None


def _saved(path: Path, settings: DatasetConfig) -> Dataset:
    """The `Dataset` of a saved folder, whose files lie in it, and none of whose formats are applied."""
    import datasets

    folder, follow = path, settings.follow_links
    if not (path / _STATE).is_file():
        splits = _json(path / _SPLITS, path, follow)["splits"]
        if settings.split not in splits:
            raise DataError(
                f"{path} has no split {settings.split!r}; it has {', '.join(map(repr, splits))}",
                hint="set `split` of this dataset",
            )
        folder = path / settings.split
    state = _json(folder / _STATE, path, follow)
    info = datasets.DatasetInfo.from_dict(_json(folder / _INFO, path, follow))
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    check_files(files, path, follow_links=follow)
    tables = [datasets.table.MemoryMappedTable.from_file(str(file)) for file in files]
    dataset = datasets.Dataset(datasets.table.concat_tables(tables), info=info)
    shown = None if state["_output_all_columns"] else state["_format_columns"]
    return dataset.with_format(None, columns=shown)


def _json(path: Path, folder: Path, follow_links: bool) -> Any:
    check_files([path], folder, follow_links=follow_links)
    if path.stat().st_size > _LARGEST_JSON:
        raise DataError(f"{path} is larger than {size(_LARGEST_JSON)}", hint="check the path")
    return json.loads(read_bytes(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Switch the progress bars of `datasets` off: they would run through our display."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class ArrowRows:
    """The rows of a `datasets.Dataset`, or of an `IterableDataset` (a stream).

    name: for places and errors. The object must not have been changed since it was loaded (`map`, `select`).
    """

    def __init__(self, dataset: Dataset | IterableDataset, name: str) -> None:
        import datasets

        self._name = name
        features = dict(dataset.features or {})
        if isinstance(dataset, datasets.Dataset) and not dataset.format["output_all_columns"]:
            features = {column: features[column] for column in dataset.format["columns"]}
        kinds = {column: _media_kind(feature) for column, feature in features.items()}
        self._media = {column: Media(kind) for column, kind in kinds.items() if kind}
        self._features = datasets.Features(
            {column: _undecoded(feature) for column, feature in features.items() if not kinds[column]}
        )
        self._stream: IterableDataset | None = None
        self._stored: Dataset | None = None
        if isinstance(dataset, datasets.IterableDataset):
            has_media = any(_undecoded(feature) != feature for feature in features.values())
            self._stream = dataset.decode(False) if has_media else dataset
        else:
            self._stored = dataset.with_format("arrow", columns=list(self._features))

    @property
    def is_stream(self) -> bool:
        return self._stream is not None

    def shuffled(self, seed: int, epoch: int) -> ArrowRows:
        """A stream with its shards (not its rows) in an order by seed and epoch."""
        assert self._stream is not None
        self._stream = self._stream.shuffle(seed=seed, buffer_size=1)
        self._stream.set_epoch(epoch)
        return self

    def __iter__(self) -> Iterator[PlacedRow]:
        """(row, place) of each row. Raises DataError for damaged data."""
        number = 0
        try:
            for row in self._stream if self._stream is not None else self._checked():
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

    def _checked(self) -> Iterator[dict[str, Any]]:
        """Each part is checked before it is read: Arrow follows a damaged offset to wherever it points."""
        assert self._stored is not None
        if not self._features:
            yield from ({} for _ in range(len(self._stored)))
            return
        for table in self._stored.iter(_ROWS_AT_A_TIME):
            table.validate(full=True)
            yield from table.to_pylist()

    def content(self, hashes: FileHashes) -> Iterator[bytes]:
        """What the rows are known by: the bytes of the files they lie in, and how these are read."""
        dataset = self._stored
        assert dataset is not None
        shown = [self._features.to_dict(), sorted(self._media)]
        yield json.dumps([len(dataset), str(dataset.split), shown], sort_keys=True, default=str).encode()
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        yield from hashes.of(files, prefix="arrow") if files else _in_memory(dataset.data.table)


def _in_memory(table: pyarrow.Table) -> Iterator[bytes]:
    for batch in table.to_batches():
        yield xxhash.xxh3_128(batch.serialize()).digest()


def _media_kind(feature: Any) -> str | None:
    """The name of what a column holds, if that is media alone: Image for pictures and lists of them."""
    if hasattr(feature, "feature"):
        return _media_kind(feature.feature)
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
