"""Datasets that the `datasets` library reads: names on the Hugging Face Hub, and folders it has saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from horizon_lm.data.arrow_rows import ArrowRows
from horizon_lm.data.sources import hint_for_names
from horizon_lm.errors import DataError
from horizon_lm.io.files import read_bytes
from horizon_lm.io.hub import require_reachable
from horizon_lm.io.inside import check_files
from horizon_lm.words import size

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_JSON = 1 << 26
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def looks_like_repository(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether `name`, which is no local path, may be a dataset on the Hub: owner/name or name."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.lower().endswith(suffixes)


def open_dataset(settings: Any, *, streaming: bool = False) -> ArrowRows:
    """The rows of a saved folder or a Hub name, in the split that is asked for.

    settings: an entry of `datasets` in the configuration. Scripts are never run. Raises DataError.
    """
    path = Path(settings.path).expanduser()
    require_reachable(settings.path, "datasets", kind="dataset", error=DataError)
    import datasets

    in_files = {} if streaming else {"keep_in_memory": False}
    try:
        with quiet(datasets):
            if path.is_dir():
                return ArrowRows(_saved(datasets, path, settings), settings.path)
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


def _saved(datasets: Any, path: Path, settings: Any) -> Any:
    """The `Dataset` of a saved folder, whose files lie in it, and none of whose formats are applied."""
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
