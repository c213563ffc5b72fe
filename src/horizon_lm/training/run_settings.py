"""The settings in a run's folder, wherever the folder and its files are now.

Paths are absolute there. Names on the Hub, built-in templates, `python-stdlib`, `auto` and `latest` are not
paths and stay as they are.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.checkpoint.identify import identify, no_checkpoint, refuse_trainer
from horizon_lm.config import TrainConfig
from horizon_lm.config.aliases import canonical_name
from horizon_lm.config.base import collect, keys_of
from horizon_lm.config.dataset_info import SUFFIXES, is_stdlib
from horizon_lm.config.yaml import Document, split_override
from horizon_lm.data.chat import built_in_templates
from horizon_lm.errors import CheckpointError

LATEST, AUTO = "latest", "auto"  # values of resume_from_checkpoint

# Settings that name files, and their values that do not.
_WORDS: dict[str, tuple[str, ...]] = {
    "model_name_or_path": (),
    "tokenizer_name_or_path": (),
    "ref_model_name_or_path": (),
    "adapter_name_or_path": (),
    "base_cache_dir": (),
    "chat_template": (),  # nor the built-in ones
    "dataset_cache_dir": ("auto",),
    "output_dir": (),
    "resume_from_checkpoint": (LATEST, AUTO),
}
_LISTS = ("datasets", "eval_datasets")
_MAY_BE_NAMES = (
    *("model_name_or_path", "tokenizer_name_or_path", "ref_model_name_or_path", "adapter_name_or_path"),
    *_LISTS,
)


def run_of(place: str) -> tuple[str, str]:
    """Return (output_dir, resume_from_checkpoint) of `horizon resume PLACE`: a run or its checkpoint.

    Raises CheckpointError if it is neither.
    """
    looked = identify(place)
    path = looked.path
    refuse_trainer(looked.checkpoints)
    if looked.kind == "checkpoint" and looked.checkpoints:
        run = path.resolve().parent
        if not RunFolder(run).settings.is_file():
            raise CheckpointError(
                f"{place!r} is a checkpoint, but {run} holds no run: config.resolved.yaml is missing",
                hint=f"horizon train CONFIG resume_from_checkpoint={place} output_dir=NEW",
            )
        return str(run), str(path)
    if looked.kind == "run" and not RunFolder(path).settings.is_file():
        raise CheckpointError(
            f"{place!r} holds checkpoints, but no run: config.resolved.yaml is missing",
            hint=f"horizon train CONFIG resume_from_checkpoint={place} output_dir=NEW",
        )
    if not looked.checkpoints and not looked.rejected:
        raise no_checkpoint(looked, "resume")
    if looked.kind == "checkpoint":
        raise no_checkpoint(looked, "resume")
    return str(path), LATEST


def read_settings(run: Path, overrides: Sequence[str]) -> tuple[Document, list[str]]:
    """Read a run's settings with `overrides` on top and moved files located, and notes on aliases."""
    path = RunFolder(run).settings
    document, notes = collect(path, overrides, keys_of(TrainConfig))
    given = given_keys(overrides)
    recorded, _ = collect(path, (), keys_of(TrainConfig))
    moved = located(recorded.values, run)
    document.values.update({key: value for key, value in moved.items() if key not in given})
    if "num_train_epochs" in given and "max_steps" not in given and document.values.get("max_steps", -1) > 0:
        notes.append(f"'num_train_epochs' replaces the run's max_steps={document.values['max_steps']}")
        document.values["max_steps"] = -1
    return document, notes


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Return the canonical names of the settings that `overrides` set."""
    return {canonical_name(split_override(text)[0][0]) for text in overrides}


def absolute(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths, as a run's folder keeps them."""
    return config.replace(
        **_mapped(config.to_dict(), lambda _, text: os.path.abspath(os.path.expanduser(text)))
    )


def located(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return those of a run's settings (canonical keys) whose files have moved, with their new paths.

    A relative path starts at the folder that output_dir was relative to, else at the working directory; what
    moved together with the run is found next to it. What is found nowhere stays as it is.
    """
    now, recorded = run.resolve(), values.get("output_dir")
    old = Path(recorded).expanduser() if isinstance(recorded, str) else now
    bases = places_of(old, now)

    def find(key: str, text: str) -> str:
        path = Path(text).expanduser()
        if path.is_absolute():
            moved = os.path.normpath(now / os.path.relpath(path, old)) if old.is_absolute() else text
            return moved if not _exists(path) and _exists(Path(moved)) else text
        return next((str(base / path) for base in bases if _exists(base / path)), text)

    return _mapped(values, find, unsure=True)


def places_of(output_dir: Path, run: Path) -> list[Path]:
    """Return bases of a run's relative paths: that of its output_dir, and the working directory."""
    found = [Path.cwd()]
    parts = Path(os.path.normpath(output_dir)).parts
    if not output_dir.is_absolute() and run.parts[-len(parts) :] == parts:
        found.insert(0, Path(*run.parts[: -len(parts)]))
    return found


def is_template_file(name: str | None) -> bool:
    return name is not None and name not in built_in_templates()


def _mapped(
    values: Mapping[str, Any], change: Callable[[str, str], str], *, unsure: bool = False
) -> dict[str, Any]:
    """Return the path settings that `change` changes. unsure: also values that may be names."""
    found: dict[str, Any] = {}
    for key in _WORDS:
        text = values.get(key)
        if isinstance(text, str) and _is_path(key, text, unsure) and change(key, text) != text:
            found[key] = change(key, text)
    for key in _LISTS:
        entries = values.get(key)
        if entries and isinstance(entries, Sequence):
            new = [
                _entry(key, entry, change, unsure)
                for entry in ([entries] if isinstance(entries, str) else entries)
            ]
            if new != entries:
                found[key] = new
    return found


def _entry(key: str, entry: Any, change: Callable[[str, str], str], unsure: bool) -> Any:
    if isinstance(entry, Mapping) and isinstance(entry.get("image_dir"), str):
        entry = {**entry, "image_dir": change(key, entry["image_dir"])}
    text = entry["path"] if isinstance(entry, Mapping) and "path" in entry else entry
    if not isinstance(text, str) or not _is_path(key, text, unsure):
        return entry
    return {**entry, "path": change(key, text)} if isinstance(entry, Mapping) else change(key, text)


def _is_path(key: str, text: str, unsure: bool) -> bool:
    if text in _WORDS.get(key, ()) or key == "chat_template" and not is_template_file(text):
        return False
    if key not in _MAY_BE_NAMES or text.startswith((".", "/", "~")) or _exists(Path(text).expanduser()):
        return True
    if key in _LISTS:
        return not is_stdlib(text) and (unsure or glob.has_magic(text) or text.lower().endswith(SUFFIXES))
    return unsure


def _exists(path: Path) -> bool:
    return (
        path.exists()
        or glob.has_magic(str(path))
        and any(True for _ in glob.iglob(str(path), recursive=True))
    )
