"""What a local folder of a model may have read: regular files that lie in it.

transformers opens what it finds there: it would wait for a named pipe, and take weights from wherever an
index of weight files points. Links are followed: weights often lie on another disk, and in the cache of the
Hub each file is a link. For a name on the Hub huggingface_hub itself refuses files outside of the repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from horizon_lm.errors import DataError
from horizon_lm.io.files import check_is_file, read_bytes

_WEIGHTS = "model.safetensors"
INDEX = f"{_WEIGHTS}.index.json"
_TEMPLATES = "additional_chat_templates"


def check_model_folder(name: str | os.PathLike[str]) -> None:
    """Raises DataError for a folder that has a pipe or a device where a file belongs, or an index that names
    a file outside of it. A name on the Hub is not looked at."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    templates = folder / _TEMPLATES
    for path in [*sorted(folder.iterdir()), *(sorted(templates.iterdir()) if templates.is_dir() else ())]:
        _check_entry(path)
    index = _index_in_use(folder)
    if index is not None:
        names_in(index)


def _check_entry(path: Path) -> None:
    if path.is_dir() or not path.exists():  # a link to nothing: who needs the file says so
        return
    try:
        check_is_file(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="replace it by a file, or remove it"
        ) from None


def _index_in_use(folder: Path) -> Path | None:
    """The index that transformers reads: the one that config.json names, else that of a model in several
    files."""
    named = _values(folder / "config.json").get("transformers_weights")
    if isinstance(named, str):  # transformers itself sees to it that this one is in the folder
        return folder / named if named.endswith(".index.json") and (folder / named).exists() else None
    index = folder / INDEX
    return index if index.exists() and not (folder / _WEIGHTS).exists() else None


def _values(path: Path) -> dict[str, Any]:
    """Of a JSON file; nothing where it cannot be read, which transformers says."""
    try:
        values = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def names_in(index: Path) -> set[str]:
    """The files that an index of weight files names. Raises DataError unless all are names in its folder."""
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
