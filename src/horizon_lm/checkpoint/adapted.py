"""Adapters on disk: PEFT's folder from a checkpoint that holds an adapter alone, and what such a folder names
as its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from horizon_lm.checkpoint.disk import damaged
from horizon_lm.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from horizon_lm.checkpoint.model import Tensors, check_weights, hollow_model, shapes_of, weights_of_units
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import ModelSettings
from horizon_lm.errors import ConfigError, OtherBaseError
from horizon_lm.io import files
from horizon_lm.io.hub import require_reachable
from horizon_lm.io.leftovers import temporary_folder
from horizon_lm.model.adapters import Adapter, prepare
from horizon_lm.model.fingerprint import Fingerprint, differing


def base_of(folder: Path) -> str:
    """Return the folder or Hub name of the base that PEFT's folder names. Raises ConfigError."""
    values = _values(folder)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG} names no base model",
            hint="set base_model_name_or_path in it to the folder or Hub name of the model",
        )
    return name


def base_here(folder: Path) -> str:
    """Return the base that PEFT's folder names, if it is here or in reach. Raises ConfigError."""
    name = base_of(folder)
    if Path(name).expanduser().is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{folder} holds an adapter, and its base {name!r} is not a folder",
            hint=f"put the base back, or set base_model_name_or_path in {folder / ADAPTER_CONFIG}",
        )
    require_reachable(name, "base_model_name_or_path")
    return name


def words_of(folder: Path) -> str:
    """Return the kind of adapter in PEFT's folder in words, such as "lora r=16"."""
    values = _values(folder)
    kind = "dora" if values.get("use_dora") else str(values.get("peft_type", "")).lower()
    return f"{kind} r={values['r']}" if isinstance(values.get("r"), int) else kind


def _values(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(files.read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="save the adapter again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object", hint="save the adapter again")
    return values


def base_name_of(checkpoint: Checkpoint) -> str:
    """Return the folder or Hub name of the base of a checkpoint's adapter. Raises ConfigError."""
    name = checkpoint.manifest.config.get("model_name_or_path")
    if not isinstance(name, str):
        raise ConfigError(
            f"{checkpoint.path} holds {checkpoint.manifest.holds} and does not name its base",
            hint="pass --merge --base FOLDER",
        )
    return name


def check_base(checkpoint: Checkpoint, now: Fingerprint | None, name: str | None) -> None:
    """Raise OtherBaseError unless the base, which is called `name`, is that of a checkpoint."""
    then = checkpoint.manifest.base or {}
    units = differing(then, now or {})
    if not units:
        return
    shown = ", ".join(units[:3]) + (f" and {len(units) - 3:,} more" if len(units) > 3 else "")
    raise OtherBaseError(
        f"{checkpoint.path} holds {checkpoint.manifest.holds} of another base than {name or 'this model'}: "
        f"other weights in {shown} ({len(units)} of {len(then)} parts)",
        hint="set model_name_or_path to the model that the run began with, unchanged",
    )


@contextmanager
def adapter_folder(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Iterator[Path]:
    """Write the adapter of a checkpoint in float32 to a folder that exists while this is open."""
    with temporary_folder("horizon-files-") as place:
        write_adapter(checkpoint, place / "adapter", torch.float32, trust_remote_code=trust_remote_code)
        yield place / "adapter"


def write_adapter(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, *, trust_remote_code: bool
) -> None:
    """Write the adapter of a checkpoint to PEFT's files in a new folder. Takes the memory of the adapter.

    Raises CheckpointError for damaged files, ConfigError.
    """
    adapter = _hollow_adapter(checkpoint, trust_remote_code=trust_remote_code)
    given = str(checkpoint.manifest.state.get("adapter", adapter.name))
    called = {
        name: ".".join(given if part == adapter.name else part for part in name.split("."))
        for name, _ in adapter.model.named_parameters()
    }
    groups = weights_of_units(checkpoint, dtype)
    shapes = {called.get(name, name): shape for name, shape in shapes_of(adapter.model).items()}
    check_weights(checkpoint, groups, shapes, [called[name] for name in called if adapter.is_part(name)])
    values: Tensors = {}
    for group in groups:
        values |= group.load()
    own = {name: values[called[name]] for name in called if called[name] in values}
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(folder, own)


def _hollow_adapter(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Adapter:
    """Build the adapter's layers without values, on `meta`."""
    if ADAPTER_CONFIG not in checkpoint.manifest.files:
        raise damaged(checkpoint.path / ADAPTER_CONFIG, "is not part of the checkpoint")
    model = hollow_model(checkpoint, trust_remote_code=trust_remote_code)
    with temporary_folder("horizon-files-") as folder:
        files.write_file(folder / ADAPTER_CONFIG, read_small(checkpoint, ADAPTER_CONFIG))
        settings = ModelSettings(adapter_name_or_path=str(folder))
        with torch.device("meta"):
            _, adapter = prepare(model, settings, has_values=False)
        assert adapter is not None
        adapter.config.base_model_name_or_path = base_of(folder)  # it knows only a temporary folder
    return adapter
