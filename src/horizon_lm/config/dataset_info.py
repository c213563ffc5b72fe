"""LLaMA-Factory's `dataset_info.json`: named datasets, converted to entries of `datasets`.

    {"name": {"file_name" | "hf_hub_url": ..., "formatting": "alpaca" | "sharegpt", "ranking": true,
              "columns": {...}, "tags": {...}, "split", "subset", "revision", "num_samples": ...}}

A name that the file lacks is a path (in the working directory or beside the file) or a Hub name with its
owner. Columns mean what they mean there: if an entry names any, the others are not read. Paths of pictures
start at the folder of the file.
"""

from __future__ import annotations

import glob
import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from horizon_lm.io.files import read_bytes
from horizon_lm.io.inside import is_inside

FILE = "dataset_info.json"
PYTHON_STDLIB = "python-stdlib"  # built-in data: the sources of Python's standard library
_PLAIN = (".txt", ".md", ".py", ".jsonl", ".json", ".csv")
SUFFIXES = (*_PLAIN, *(f"{suffix}.gz" for suffix in _PLAIN), ".parquet")  # of data files
_LARGEST = 1 << 24  # bytes
_ONLINE = "ONLINE"  # in place of the folder, in LLaMA-Factory: all names are on the Hub

# Their columns -> ours, by formatting, and the columns read if an entry names none.
_COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "system": "system", "tools": "tools"},
}
_UNNAMED: dict[str, frozenset[str]] = {
    "alpaca": frozenset({"prompt", "query", "response"}),
    "sharegpt": frozenset({"messages"}),
    "openai": frozenset({"messages"}),
}
# The same of preferences, in place of a response (ranking) or beside it (kto_tag).
_PREFERRED = {"chosen": "chosen", "rejected": "rejected"}
_LABEL = {"kto_tag": "label"}
# Columns that their format labelled or preference would also read, but LLaMA-Factory does not.
_UNREAD = ("prompt", "completion", "output")
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_TAKEN = {"split": "split", "subset": "name", "revision": "revision", "num_samples": "max_samples"}
_SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = (*_SOURCES, *_TAKEN, "file_sha1", "folder", "ranking", "formatting", "columns", "tags")
_MEDIA = ("videos", "audios")
_PICTURES = {"images": "images"}


def is_stdlib(name: str) -> bool:
    return name == PYTHON_STDLIB and not os.path.exists(name)


class InfoError(ValueError):
    """An error in the file or in a name looked up in it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def resolved(value: Any, folder: str) -> Any:
    """Resolve the names in a value of `datasets`: text (names separated by commas), or a list of names and
    entries. Leaves other values to the checks of settings. Raises InfoError."""
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list):
        return value
    info = {} if folder == _ONLINE else read(Path(folder).expanduser())
    return [_entry(entry, info, folder) for entry in entries]


def read(folder: Path) -> dict[str, Any]:
    """Read the file. Raises InfoError if it is missing or not a mapping of mappings."""
    path = folder / FILE
    try:
        if path.stat().st_size > _LARGEST:
            raise InfoError(f"{path} is larger than {_LARGEST} bytes", "check the path")
        info = json.loads(read_bytes(path).decode("utf-8-sig"))
    except OSError as error:
        raise InfoError(
            f"{path} cannot be read: {error.strerror or error}",
            "set dataset_dir to the folder of LLaMA-Factory's dataset_info.json, or leave it out",
        ) from error
    except json.JSONDecodeError as error:
        raise InfoError(f"{path}:{error.lineno} is not valid JSON: {error.msg}", "correct it") from error
    except (ValueError, RecursionError) as error:
        raise InfoError(f"{path} is not usable JSON: {error}", "save it as UTF-8") from error
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise InfoError(f"{path} is not an object of objects", 'write {"name": {"file_name": "a.json"}}')
    return info


def _entry(entry: Any, info: dict[str, Any], folder: str) -> Any:
    """Complete an entry of `datasets` by what the file has for its name; the entry's own keys win."""
    own = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(own, dict) or not isinstance(own.get("path"), str):
        return entry
    name = own["path"].strip()
    if name in info:
        described = _described(name, info[name], folder, follow_links=own.get("follow_links") is True)
        return {**described, **{k: v for k, v in own.items() if k != "path"}}
    return {**own, "path": _path(name, info, folder)}


def _path(name: str, info: dict[str, Any], folder: str) -> str:
    beside = os.path.join(folder, name)
    if not os.path.exists(os.path.expanduser(name)) and os.path.exists(os.path.expanduser(beside)):
        return beside
    is_file = os.path.exists(os.path.expanduser(name)) or glob.has_magic(name) or name.endswith(SUFFIXES)
    if is_file or is_stdlib(name) or "/" in name or folder == _ONLINE:
        return name
    near = get_close_matches(name, info, 1)
    known = ", ".join(sorted(info)[:8])
    raise InfoError(
        f"{os.path.join(folder, FILE)} has no dataset {name!r}, and there is no such file",
        f"did you mean {near[0]!r}?" if near else f"use one of {known}" if known else "add it to the file",
    )


def _described(name: str, entry: dict[str, Any], folder: str, *, follow_links: bool) -> dict[str, Any]:
    at = f"{os.path.join(folder, FILE)}: {name}"
    _check(entry, at)
    formatting = entry.get("formatting") or "alpaca"
    columns = entry.get("columns") or {}
    result: dict[str, Any] = {"path": _source(entry, at, folder)}
    if not follow_links and result["path"] != entry.get("hf_hub_url"):
        _check_inside(name, Path(result["path"]), at, Path(folder).expanduser())
    result.update({ours: entry[key] for key, ours in _TAKEN.items() if entry.get(key) is not None})
    is_preference = bool(entry.get("ranking") or columns.get("kto_tag"))
    if formatting == "alpaca" and columns.get("prompt") and not (columns.get("response") or is_preference):
        return {**result, "format": "text", "text_column": columns["prompt"]}  # pretraining
    known, unnamed = _COLUMNS[formatting], _UNNAMED[formatting]
    if entry.get("ranking"):
        result["format"] = "preference"
        known = {**{key: ours for key, ours in known.items() if key != "response"}, **_PREFERRED}
        unnamed = unnamed - {"response"} | _PREFERRED.keys()
    elif columns.get("kto_tag"):
        result["format"], known = "labelled", {**known, **_LABEL}
    else:
        result["format"] = _FORMATS[formatting]
    if columns.get("images"):
        known, result["image_dir"] = {**known, **_PICTURES}, folder
    renamed = _renamed(known, columns, unnamed)
    if is_preference:
        renamed = {**dict.fromkeys(c for c in _UNREAD if c not in columns.values()), **renamed}
    if renamed:
        result["columns"] = renamed
    if entry.get("tags"):
        result["tags"] = {tag: word for tag, word in entry["tags"].items() if word is not None}
    return result


def _check(entry: dict[str, Any], at: str) -> None:
    for key in entry:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, 1)
            raise InfoError(
                f"{at}: unknown key {key!r}",
                f"did you mean {near[0]!r}?" if near else f"use {', '.join(_KEYS)}",
            )
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _COLUMNS:
        raise InfoError(f"{at}: unknown formatting {formatting!r}", f"use {', '.join(_COLUMNS)}")
    for part in ("columns", "tags"):
        given = entry.get(part) or {}
        if not isinstance(given, dict) or not all(isinstance(v, str) or v is None for v in given.values()):
            raise InfoError(f"{at}: {part} is not an object of texts", 'write {"messages": "conversations"}')
    columns = entry.get("columns") or {}
    for key in columns:
        if key in _MEDIA:
            hint = "choose a dataset of text or pictures"
            raise InfoError(f"{at} has {key}, but only text and pictures are supported", hint)
        if not any(key in known for known in (_COLUMNS[formatting], _PREFERRED, _LABEL, _PICTURES)):
            raise InfoError(
                f"{at}: columns has the unknown key {key!r} for {formatting}",
                f"use {', '.join(_COLUMNS[formatting])}",
            )
    if entry.get("ranking") and columns and not all(columns.get(key) for key in _PREFERRED):
        raise InfoError(
            f"{at} has ranking: true, but its columns do not name chosen and rejected",
            'add "chosen": "chosen", "rejected": "rejected" to columns',
        )


def _source(entry: dict[str, Any], at: str, folder: str) -> str:
    if entry.get("hf_hub_url"):
        if entry.get("folder"):
            raise InfoError(
                f"{at}: 'folder' with hf_hub_url is not supported",
                "download the dataset and give the folder as a path",
            )
        return str(entry["hf_hub_url"])
    if entry.get("file_name") and not entry.get("script_url"):
        return os.path.join(folder, str(entry["file_name"]))
    given = next((key for key in _SOURCES if entry.get(key)), None)
    raise InfoError(
        f"{at} has only {given}, which is not supported"
        if given
        else f"{at} has neither file_name nor hf_hub_url",
        "download the data and give it a file_name; scripts are never run",
    )


def _check_inside(name: str, path: Path, at: str, folder: Path) -> None:
    if not is_inside(path.expanduser(), folder):
        raise InfoError(
            f"{at}: file_name leads out of its folder, to {path.expanduser().resolve()}",
            f"move the file there, or set datasets=[{{path: {name}, follow_links: true}}]",
        )


def _renamed(
    known: dict[str, str], given: dict[str, str | None], unnamed: frozenset[str]
) -> dict[str, str | None]:
    """Convert their columns to our renames; null for columns of ours that are not read."""
    used = {key: column for key, column in given.items() if column and key in known}
    if not given:
        used = {key: known[key] for key in unnamed}
    renames: dict[str, str | None] = {c: known[key] for key, c in used.items() if c != known[key]}
    read = set(used.values())
    dropped = [ours for key, ours in known.items() if key not in used and ours not in read]
    return {**renames, **dict.fromkeys(dropped)}
