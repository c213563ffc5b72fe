"""Several sources of settings become one: a file, then `key=value` overrides, or values from Python."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from horizon_lm.config.aliases import (
    DROPPED,
    canonical_name,
    canonical_value,
    canonicalise,
    conflict,
    drop_or_note,
)
from horizon_lm.config.yaml import Document, KeyPath, read_file, read_value, split_override
from horizon_lm.errors import ConfigError


def plain(value: Any, place: str) -> Any:
    """Plain data of what Python callers pass: paths, torch dtypes and devices become text, tuples lists."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{place}: {value} is not a finite number", hint="pass a number, or None")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{place}: {key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, place) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if hasattr(value, "model_dump"):  # one of our own settings objects
        return value.model_dump(mode="python")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return plain(value.item(), place)
    if type(value).__module__ == "torch" and not hasattr(value, "ndim"):  # a dtype or a device
        return str(value).removeprefix("torch.")
    raise ConfigError(
        f"{place}: a {type(value).__name__} is no setting's value",
        hint="pass text, numbers, booleans, None, paths, torch dtypes or devices, or lists and dicts of them",
    )


@dataclass(frozen=True)
class Keys:
    """known: all settings. text: those whose value is any text, or null. nullable: those to which null says
    something, or that must be given."""

    known: frozenset[str]
    text: frozenset[str]
    nullable: frozenset[str]


# A setting of the command line that stands in place of others, which a file may name.
REPLACES = {"tokens_per_step": ("per_device_train_batch_size", "gradient_accumulation_steps")}


def collect(
    path: str | os.PathLike[str] | None, overrides: Iterable[str], keys: Keys
) -> tuple[Document, list[str]]:
    """The settings of a file (or of none) with overrides on top, and one-line notes."""
    document = Document({}, {(): "command line"}) if path is None else read_file(path)
    empty = _drop_empty(document, keys) if path is not None else []
    document, notes = canonicalise(document)
    if empty:
        notes.append(f"{path}: keys without a value are as if not written: {', '.join(empty)}")
    written: dict[str, str] = {}
    for text in overrides:
        _override(document, text, keys.text, written, notes)
    for key, others in REPLACES.items():
        if key in written and document.values[key] is not None:
            for other in others:
                if other not in written and document.values.pop(other, None) is not None:
                    notes.append(f"command line: '{key}' stands in place of the file's '{other}'")
    return document, notes


def _drop_empty(document: Document, keys: Keys) -> list[str]:
    """Take out the keys of a file that stand there without a value, as in files written for Axolotl; but not
    where null is one of the values. Returns their names."""
    empty = [
        key
        for key, value in document.values.items()
        if value is None and key not in DROPPED and canonical_name(key) not in keys.nullable
    ]
    for key in empty:
        del document.values[key]
    return empty


def _override(
    document: Document, text: str, text_keys: frozenset[str], written: dict[str, str], notes: list[str]
) -> None:
    """Put one `key=value` into `document`. The same key again wins over the earlier one."""
    place = "command line"
    (key, *inner), raw = split_override(text)
    dropped, note = drop_or_note(key, place, _off(raw))
    if note and note not in notes:
        notes.append(note)
    if dropped:
        return
    name = canonical_name(key)
    if written.setdefault(name, key) != key:
        raise conflict(written[name], key, place)
    target, leaf = document.values, name
    for part in inner:
        if target.get(leaf) is None:
            target[leaf] = {}
            document.where.setdefault((name,), place)
        target, leaf = target[leaf], part
        if not isinstance(target, dict):
            raise ConfigError(f"{place}: '{text}': {key} is not a mapping", f"write {key}=VALUE")
    if inner:
        value = read_value(raw, f"{place}: {text}")
    else:
        value = canonical_value(key, _value_of(name, raw, text_keys), place)
    target[leaf] = value
    written_path: KeyPath = (name, *inner)
    for old in [old for old in document.where if old[: len(written_path)] == written_path]:
        del document.where[old]
    document.where[written_path] = place


def _off(raw: str) -> Any:
    """null and false as values, any other text as it is."""
    return {"": None, "null": None, "~": None, "false": False}.get(raw.strip(), raw)


def _value_of(name: str, raw: str, text_keys: frozenset[str]) -> Any:
    """The value of an override. Text is taken verbatim: `sample_prompt=def f(x):` is no mapping."""
    stripped = raw.strip()
    if name in ("datasets", "eval_datasets"):
        verbatim = not stripped.startswith(("[", "{", '"', "'"))
    else:
        verbatim = name in text_keys and not stripped.startswith(('"', "'"))
    if verbatim and stripped not in ("", "null", "~"):
        return raw
    return read_value(raw, f"command line: {name}={raw}")
