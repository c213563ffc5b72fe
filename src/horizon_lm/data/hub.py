"""Datasets that the `datasets` library reads: names on the Hugging Face Hub, and folders it has saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horizon_lm.data.parquet_file import without_filling
from horizon_lm.data.sources import PlacedRow, hint_for_names
from horizon_lm.errors import DataError
from horizon_lm.hub_access import require_reachable

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def looks_like_repository(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether `name`, which is no local path, may be a dataset on the Hub: owner/name or name."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.lower().endswith(suffixes)


def open_dataset(settings: Any, *, streaming: bool = False) -> Any:
    """The `datasets` object of a saved folder or a Hub name, in the split that is asked for.

    settings: an entry of `datasets` in the configuration. Scripts are never run. Raises DataError.
    """
    path = Path(settings.path).expanduser()
    require_reachable(settings.path, "datasets", kind="dataset", error=DataError)
    import datasets

    try:
        with quiet(datasets):
            if path.is_dir():
                return _saved(datasets, path, settings)
            return datasets.load_dataset(
                settings.path,
                name=settings.name,
                split=settings.split,
                revision=settings.revision,
                streaming=streaming,
            )
    except DataError:
        raise
    except Exception as error:  # the library and the Hub's client raise many kinds; each means "no data"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{settings.path} is no local file, and could not be read as a dataset of the Hub: {reason[:300]}"
            if not path.exists()
            else f"{settings.path} could not be read as a saved dataset: {reason[:300]}",
            hint=(hint_for_names(settings.path) if not path.exists() else None)
            or "check the path or the name, `name` (the dataset's configuration), `split` and the network",
        ) from error


def _saved(datasets: Any, path: Path, settings: Any) -> Any:
    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if settings.split not in loaded:
        raise DataError(
            f"{path} has no split {settings.split!r}; it has {', '.join(map(repr, loaded))}",
            hint="set `split` of this dataset",
        )
    return loaded[settings.split]


def rows_of(dataset: Any, name: str) -> Iterator[PlacedRow]:
    """(row, place) of each row of a `datasets` object."""
    for number, row in enumerate(dataset, start=1):
        yield without_filling(row), f"{name}: row {number}"


def fingerprint(dataset: Any) -> str:
    """The library's own fingerprint of the content and of what was done to it."""
    return str(dataset._fingerprint)


class quiet:
    """Its progress bars would run through our display."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets

    def __enter__(self) -> None:
        self._shown = self._datasets.utils.logging.is_progress_bar_enabled()
        self._datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._datasets.enable_progress_bars()
