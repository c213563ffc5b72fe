"""Checks of a local model folder: only regular files inside it are read.

transformers opens whatever it finds: it would wait for a named pipe, and read weights from wherever a weight
index points. Links are followed: weights often lie on another disk, and every file in the Hub cache is a
link. For Hub names, huggingface_hub itself rejects files outside the repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from horizon_lm.errors import ConfigError, DataError
from horizon_lm.io.files import check_is_file, read_bytes

ADAPTER = "adapter_config.json"
_WEIGHTS = "model.safetensors"
INDEX = f"{_WEIGHTS}.index.json"
_TEMPLATES = "additional_chat_templates"


def check_model_folder(name: str | os.PathLike[str]) -> None:
    """Raise DataError for a folder with a pipe or device in place of a file, or an index that names a file
    outside it. Hub names are not checked."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    templates = folder / _TEMPLATES
    for path in [*sorted(folder.iterdir()), *(sorted(templates.iterdir()) if templates.is_dir() else ())]:
        _check_entry(path)
    index = _index_in_use(folder)
    if index is not None:
        names_in(index)


def check_is_model(name: str | os.PathLike[str]) -> None:
    """Raise ConfigError for the folder of an adapter in place of a model's."""
    folder = Path(name).expanduser()
    if (folder / ADAPTER).is_file() and not (folder / "config.json").exists():
        raise ConfigError(
            f"model_name_or_path={str(folder)!r} holds an adapter, not a model",
            hint=f"set model_name_or_path to its base, and adapter_name_or_path={folder}",
        )


def _check_entry(path: Path) -> None:
    if path.is_dir() or not path.exists():  # a broken link: whoever needs the file reports it
        return
    try:
        check_is_file(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="replace it by a file, or remove it"
        ) from None


def _index_in_use(folder: Path) -> Path | None:
    """The index that transformers reads: the one named in config.json, else that of a sharded model."""
    named = _values(folder / "config.json").get("transformers_weights")
    if isinstance(named, str):  # transformers itself checks that this one is in the folder
        return folder / named if named.endswith(".index.json") and (folder / named).exists() else None
    index = folder / INDEX
    return index if index.exists() and not (folder / _WEIGHTS).exists() else None


def _values(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it cannot be read, which transformers reports."""
    try:
        values = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def names_in(index: Path) -> set[str]:
    """Return the files named in a weight index. Raises DataError unless all are names in its folder."""
    try:
        names = set(json.loads(read_bytes(index))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DataError(f"{index} is damaged: {error}", hint="download or export it again") from error
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise DataError(
                f"{index} names {name!r}, which is not in its folder", hint="do not trust this model"
            )
    return names
