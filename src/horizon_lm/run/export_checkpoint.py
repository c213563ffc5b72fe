"""`horizon export`: a checkpoint becomes a Hugging Face folder, and is never whole in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import folder as checkpoints
from ..checkpoint.folder import Checkpoint
from ..checkpoint.reader import file_checksum, read_small
from ..checkpoint.writer import BUFFERS
from ..engine.policies import DTYPES
from ..errors import CheckpointError, ConfigError
from ..memory.master import join_master
from .card import model_card
from .export import Group, Tensors, write_folder, write_model

_NO_WEIGHTS = ("config.json", "generation_config.json")


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
    own = DTYPES[str(manifest.config.get("dtype", "bfloat16"))]
    wanted = own if dtype is None else DTYPES[dtype]
    model = _hollow_model(checkpoint, trust_remote_code)
    wide = frozenset(manifest.state.get("kept_in_fp32", ()))
    names = [name for name in manifest.files if name.startswith("unit-")] + [BUFFERS]
    groups = [_group(checkpoint, name, wanted, own, wide) for name in names]

    def write(folder: Path) -> None:
        write_model(model, _aliases(model), groups, folder, wanted, max_shard_size)
        for name in manifest.files:
            if name not in (*names, *_NO_WEIGHTS):  # the tokenizer and its templates
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(read_small(checkpoint, name))
        tokens = manifest.state.get("meter", {}).get("sums", [None])[0]
        card = model_card(
            manifest.config,
            model_type=str(model.config.model_type),
            step=manifest.step,
            num_tokens=tokens,
            versions=manifest.versions,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(target, write)


def _hollow_model(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The model as transformers builds it from the configuration, on `meta`."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory(prefix="horizon-") as name:
        folder = Path(name)
        for file in _NO_WEIGHTS:
            if file in checkpoint.manifest.files:
                (folder / file).write_bytes(read_small(checkpoint, file))
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{checkpoint.path / 'config.json'}: is not part of the checkpoint")
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if values.get("auto_map") and not trust_remote_code:
            raise ConfigError(
                f"{checkpoint.path}: the model comes with code of its own, which is not run",
                hint="--trust-remote-code, if you have read it",
            )
        try:
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **options)
        except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{checkpoint.path / 'config.json'} is refused by transformers: {reason}"
            ) from error
        if (folder / _NO_WEIGHTS[1]).exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
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
                    tensor = join_master(tensor, file.get_tensor(rest)) if rest in keys else tensor.float()
                found[plain] = tensor.to(dtype) if prefix else tensor
        return found

    return Group(dict(_shapes(path, prefix, wanted, wide)), load)


def _shapes(
    path: Path, prefix: str, wanted: torch.dtype, wide: frozenset[str]
) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor on `meta`) of what is exported from a file, from its header alone."""
    found = []
    with safe_open(path, framework="pt") as file:
        for key in sorted(key for key in file.keys() if key.startswith(prefix)):  # noqa: SIM118
            plain, view = key.removeprefix(prefix), file.get_slice(key)
            dtype = torch.float32 if plain in wide else wanted
            if not prefix:
                dtype = file.get_tensor(key).dtype
            found.append((plain, torch.empty(view.get_shape(), dtype=dtype, device="meta")))
    return found
