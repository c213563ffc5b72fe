"""Datasets read by the `datasets` library: names on the Hugging Face Hub, and folders it has saved.

Rows are plain Python values, regardless of `set_format`. Media are not decoded, as each kind needs a library:
their columns hold a placeholder, so that they may stand beside text; that of a picture has its bytes or path.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
from horizon_lm.io.hub import REPOSITORY, require_reachable
from horizon_lm.io.inside import check_files
from horizon_lm.words import size

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_JSON = 1 << 26
_MEDIA = frozenset({"Audio", "Image", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure"})
_ROWS_AT_A_TIME = 10  # the library's own batch


def is_saved_dataset(path: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def looks_like_repository(name: str) -> bool:
    """Return whether `name`, which is not a local path, may be a dataset on the Hub: owner/name or name."""
    return bool(REPOSITORY.fullmatch(name)) and not name.lower().endswith(SUFFIXES)


def open_dataset(settings: DatasetConfig, *, streaming: bool = False) -> ArrowRows:
    """Open the chosen split of a saved folder or Hub name. Never runs scripts. Raises DataError."""
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
    except Exception as error:  # the library and the Hub client raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"{settings.path} is not a local file and could not be read from the Hub: {reason}"
            if not path.exists()
            else f"{settings.path} could not be read as a saved dataset: {reason}",
            hint=(hint_for_names(settings.path) if not path.exists() else None)
            or "check the path or name, `name` (the dataset's configuration), `split` and the network",
        ) from error


def hint_for_names(name: str) -> str | None:
    """Suggest a fix for a name that LLaMA-Factory would look up, and for several paths in one string."""
    if os.path.isfile("data/dataset_info.json"):
        return "set dataset_dir=data to look names up in data/dataset_info.json"
    return "pass several datasets as a list: datasets=[A, B]" if "," in name else None


def _saved(path: Path, settings: DatasetConfig) -> Dataset:
    """Load a saved folder, whose files must lie in it, without its formats."""
    import datasets

    folder, follow = path, settings.follow_links
    if not (path / _STATE).is_file():
        splits = _json(path / _SPLITS, path, follow)["splits"]
        if settings.split not in splits:
            raise DataError(
                f"{path} has no split {settings.split!r}; it has {', '.join(map(repr, splits))}",
                hint="set `split` of this dataset to one of them",
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
    """Disable the progress bars of `datasets`, which would disturb our display."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class ArrowRows:
    """Rows of a `datasets.Dataset`, or of an `IterableDataset` (a stream), as loaded (no `map` or `select`).

    name: for places and errors.
    """

    def __init__(self, dataset: Dataset | IterableDataset, name: str) -> None:
        import datasets

        self._name = name
        features = dict(dataset.features or {})
        if isinstance(dataset, datasets.Dataset) and not dataset.format["output_all_columns"]:
            features = {column: features[column] for column in dataset.format["columns"]}
        kinds = {column: _media_kind(feature) for column, feature in features.items()}
        self._media = {column: Media(kind) for column, kind in kinds.items() if kind}
        self._pictures = [column for column, kind in kinds.items() if kind == "Image"]
        self._features = datasets.Features(
            {column: _undecoded(feature) for column, feature in features.items() if not kinds[column]}
        )
        self._stream: IterableDataset | None = None
        self._stored: Dataset | None = None
        if isinstance(dataset, datasets.IterableDataset):
            has_media = any(_undecoded(feature) != feature for feature in features.values())
            self._stream = dataset.decode(False) if has_media else dataset
        else:
            self._stored = dataset.with_format("arrow", columns=[*self._features, *self._pictures])

    @property
    def is_stream(self) -> bool:
        return self._stream is not None

    def shuffled(self, seed: int, epoch: int) -> ArrowRows:
        """Shuffle the shards of a stream (not its rows) by seed and epoch."""
        assert self._stream is not None
        self._stream = self._stream.shuffle(seed=seed, buffer_size=1)
        self._stream.set_epoch(epoch)
        return self

    def __iter__(self) -> Iterator[PlacedRow]:
        """Yield (row, place). Raises DataError for damaged data."""
        number = 0
        try:
            for row in self._stream if self._stream is not None else self._checked():
                number += 1
                decoded = self._features.decode_example({k: row[k] for k in self._features if k in row})
                media = {**self._media, **{c: Media("Image", row.get(c)) for c in self._pictures}}
                yield without_filling({**row, **decoded, **media}), f"{self._name}: row {number}"
        except DataError:
            raise
        except Exception as error:  # from Arrow, the library or, in a stream, the network
            after = f"after row {number}" if number else "from the first row"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise DataError(
                f"{self._name} cannot be read {after}: {reason}", hint="write or download it again"
            ) from error

    def _checked(self) -> Iterator[dict[str, Any]]:
        """Validate each table before reading it: Arrow follows damaged offsets anywhere."""
        assert self._stored is not None
        if not self._features and not self._pictures:
            yield from ({} for _ in range(len(self._stored)))
            return
        for table in self._stored.iter(_ROWS_AT_A_TIME):
            table.validate(full=True)
            yield from table.to_pylist()

    def content(self, hashes: FileHashes) -> Iterator[bytes]:
        """Yield what identifies the rows: how they are read, and the bytes of their files."""
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
    """Return the media type that a column holds, alone or in lists, such as Image."""
    if hasattr(feature, "feature"):
        return _media_kind(feature.feature)
    name = type(feature).__name__
    return name if name in _MEDIA else None


def _undecoded(feature: Any) -> Any:
    """Return the feature with its media left encoded."""
    if isinstance(feature, dict):
        return {key: _undecoded(part) for key, part in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if type(feature).__name__ in _MEDIA:
        return dataclasses.replace(feature, decode=False)
    return feature
