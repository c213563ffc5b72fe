"""`horizon export`: a checkpoint becomes a Hugging Face folder, and is never whole in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.card import model_card
from horizon_lm.checkpoint.export import Group, Tensors, write_folder, write_model
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.hollow import CONFIGURATIONS, hollow_model
from horizon_lm.checkpoint.reader import file_checksum, read_small
from horizon_lm.checkpoint.writer import BUFFERS
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.io import files
from horizon_lm.memory.master import join_master

_FLOATS = ("BF16", "F16", "F32")  # dtypes of weights, as safetensors names them
_UNIT_FILE = re.compile(r"unit-[0-9]{5,9}\.safetensors")


def export_checkpoint(
    place: Path,
    target: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Checkpoint:
    """Write the model of a checkpoint (or of a run's latest sound one) to `target`; whole or absent.

    dtype: None for that of the run; float32 gives its masters. Raises CheckpointError, ConfigError,
    DoesNotFitError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", hint="export to a new folder")
    found = checkpoints.candidates(place, warn)
    for checkpoint in found:
        try:
            _export(checkpoint, target, dtype, max_shard_size, trust_remote_code)
            return checkpoint
        except CheckpointError as error:
            if len(found) == 1:
                raise
            warn(f"passed over {error.message}")
    raise CheckpointError(f"no checkpoint of {place} could be exported", hint="horizon verify shows why")


def _export(
    checkpoint: Checkpoint, target: Path, dtype: str | None, max_shard_size: str, trust_remote_code: bool
) -> None:
    manifest = checkpoint.manifest
    wanted = DTYPES[dtype or str(manifest.config.get("dtype", "bfloat16"))]
    model = hollow_model(checkpoint, trust_remote_code=trust_remote_code)
    groups = groups_of(checkpoint, wanted)
    _check_weights(checkpoint, groups, model)

    def write(folder: Path) -> None:
        write_model(model, _aliases(model), groups, folder, wanted, max_shard_size)
        for name in manifest.files:
            if not name.endswith(".safetensors") and name not in CONFIGURATIONS:  # tokenizer and templates
                files.write_file(folder / name, read_small(checkpoint, name), below=folder)
        tokens = manifest.state.get("meter", {}).get("sums", [None])[0]
        card = model_card(
            manifest.config,
            model_type=str(model.config.model_type),
            step=manifest.step,
            num_tokens=tokens,
            versions=manifest.versions,
        )
        files.write_file(folder / "README.md", card)

    write_folder(target, write)


def groups_of(checkpoint: Checkpoint, wanted: torch.dtype) -> list[Group]:
    """The weights of a checkpoint, one group for each unit, and its buffers."""
    own = DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))]
    wide = frozenset(checkpoint.manifest.state.get("kept_in_fp32", ()))
    names = [name for name in checkpoint.manifest.files if _UNIT_FILE.fullmatch(name)] + [BUFFERS]
    if BUFFERS not in checkpoint.manifest.files:
        raise CheckpointError(f"{checkpoint.path / BUFFERS}: is not part of the checkpoint")
    return [_group(checkpoint, name, wanted, own, wide) for name in names]


def model_of(checkpoint: Checkpoint, *, trust_remote_code: bool, attn_implementation: str) -> Any:
    """The transformers model of a checkpoint with its weights, as the run computes with them.

    Raises CheckpointError for what is damaged, ConfigError.
    """
    model = hollow_model(
        checkpoint, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
    )
    groups = groups_of(checkpoint, DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))])
    _check_weights(checkpoint, groups, model)
    for group in groups:
        model.load_state_dict(group.load(), strict=False, assign=True)
    model.tie_weights()
    return model


def _aliases(model: Any) -> dict[str, list[str]]:
    """Of the first name of each parameter the other names that it has."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found.setdefault(known, []).append(name)
    return found


def _group(
    checkpoint: Checkpoint, name: str, wanted: torch.dtype, own: torch.dtype, wide: frozenset[str]
) -> Group:
    """The weights of one unit's file; its checksum is looked at before anything in it is used."""
    path = checkpoint.path / name
    if file_checksum(path) != checkpoint.manifest.files[name][1]:
        raise CheckpointError(f"{path}: its content is not what was written (checksum)")
    prefix = "weights." if name != BUFFERS else ""

    def load() -> Tensors:
        with safe_open(path, framework="pt") as file:
            keys = frozenset(file.keys())
            found = {}
            for key in sorted(key for key in keys if key.startswith(prefix)):
                tensor, plain = file.get_tensor(key), key.removeprefix(prefix)
                dtype = torch.float32 if plain in wide else wanted
                if prefix and own == torch.bfloat16 and dtype == torch.float32:
                    rest = f"residual.{plain}"
                    tensor = _joined(tensor, file.get_tensor(rest), path) if rest in keys else tensor.float()
                found[plain] = tensor.to(dtype) if prefix else tensor
        return found

    return Group(dict(_shapes(path, prefix, wanted, wide)), load)


def _joined(weight: torch.Tensor, rest: torch.Tensor, path: Path) -> torch.Tensor:
    kinds = (weight.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    if not kinds or weight.shape != rest.shape:
        raise CheckpointError(f"{path}: residual ({rest.dtype} {list(rest.shape)}) and weight do not fit")
    return join_master(weight, rest)


def _shapes(
    path: Path, prefix: str, wanted: torch.dtype, wide: frozenset[str]
) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor on `meta`) of what is exported from a file, from its header alone."""
    found = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(key for key in file.keys() if key.startswith(prefix)):  # noqa: SIM118
                plain, view = key.removeprefix(prefix), file.get_slice(key)
                dtype = torch.float32 if plain in wide else wanted
                if not prefix:
                    dtype = file.get_tensor(key).dtype
                elif view.get_dtype() not in _FLOATS:
                    raise CheckpointError(f"{path}: {key} is of {view.get_dtype()}, which no weight is")
                found.append((plain, torch.empty(view.get_shape(), dtype=dtype, device="meta")))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return found


def _check_weights(checkpoint: Checkpoint, groups: list[Group], model: Any) -> None:
    """Raises CheckpointError unless the weights are those of the model, each once."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name, tensor in group.hollow.items():
            if name in found or name not in expected:
                what = "is in two of its files" if name in found else "is of no part of the model"
                raise CheckpointError(f"{checkpoint.path}: {name} {what}")
            found[name] = tuple(tensor.shape)
            if found[name] != expected[name]:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {list(found[name])}, "
                    f"the model needs {list(expected[name])}"
                )
    missing = [name for name, _ in model.named_parameters() if name not in found]
    if missing:
        raise CheckpointError(f"{checkpoint.path}: has no weights of {missing[0]}")
