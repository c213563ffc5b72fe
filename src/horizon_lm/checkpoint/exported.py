"""Export the model of a checkpoint, its adapter, or its base with the adapter in it, as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from horizon_lm.checkpoint.adapted import (
    adapter_folder,
    base_name_of,
    base_of,
    check_base,
    words_of,
    write_adapter,
)
from horizon_lm.checkpoint.card import WHOLE, Part, adapter_part, model_card
from horizon_lm.checkpoint.export import aliases_of, write_folder, write_model
from horizon_lm.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, candidates
from horizon_lm.checkpoint.merge import merged
from horizon_lm.checkpoint.model import (
    CONFIGURATIONS,
    TRAINER_FILES,
    check_weights,
    hollow_model,
    shapes_of,
    weights_of,
)
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import ModelSettings
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import CheckpointError, ConfigError, OtherBaseError
from horizon_lm.io import files


@dataclass(frozen=True)
class Merge:
    """Ask for a plain model instead of an adapter. base: folder or Hub name of the model to add it to; None
    for the one that the run names."""

    base: str | None = None


@dataclass(frozen=True)
class Form:
    """How to write a model. dtype: None for that of the run; float32 for its masters. max_shard_size: of a
    weight file, as in "5GB". trust_remote_code: run code of the model. merge: add an adapter to its base."""

    dtype: str | None = None
    max_shard_size: str = "5GB"
    trust_remote_code: bool = False
    merge: Merge | None = None

    def dtype_of(self, checkpoint: Checkpoint) -> str:
        return self.dtype or str(checkpoint.manifest.config.get("dtype", "bfloat16"))


def export_checkpoint(
    place: Path, target: Path, form: Form, warn: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """Write the model of a checkpoint (or of a run's latest sound one) to `target` atomically; of a run with
    an adapter the adapter, or with `form.merge` the model with the adapter in its weights.

    Raises CheckpointError, ConfigError, DataError, DoesNotFitError.
    """
    _check_new(target)
    found = candidates(place, warn)
    for checkpoint in found:
        try:
            _export(checkpoint, target, form)
            return checkpoint
        except CheckpointError as error:
            if len(found) == 1 or isinstance(error, OtherBaseError):
                raise
            warn(f"skipped {error.message}")
    raise CheckpointError(f"{place}: no checkpoint could be exported", hint=f"horizon verify {place}")


def merge_folder(folder: Path, target: Path, form: Form) -> str:
    """Write the base of PEFT's folder with the adapter in its weights to `target` atomically; return the name
    of the base.

    form: its dtype None is that of the base. Raises ConfigError, DataError, DoesNotFitError.
    """
    _check_new(target)
    base = (form.merge.base if form.merge is not None else None) or base_of(folder)
    settings = ModelSettings(adapter_name_or_path=str(folder), trust_remote_code=form.trust_remote_code)
    made = merged(settings, base, form.dtype, lambda found: None)

    def write(staging: Path) -> None:
        aliases = aliases_of(made.hollow)
        write_model(made.hollow, aliases, made.groups, staging, made.dtype, form.max_shard_size)
        for path in sorted(folder.iterdir()):
            is_adapters = path.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md")
            if path.is_file() and not is_adapters and not path.name.endswith(".safetensors"):
                files.write_file(staging / path.name, files.read_bytes(path), below=staging)

    write_folder(target, write)
    return base


def _check_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", hint="export to a new folder")


def _export(checkpoint: Checkpoint, target: Path, form: Form) -> None:
    manifest = checkpoint.manifest
    if "adapter" not in manifest.state:
        if manifest.base is not None:
            raise ConfigError(
                f"{checkpoint.path} holds {manifest.holds}, which is not a model by itself",
                hint="train an adapter (adapter: lora) on packed weights",
            )
        if form.merge is not None:
            raise ConfigError(
                f"{checkpoint.path} holds {manifest.holds}: there is no adapter to merge",
                hint=f"horizon export {checkpoint.path} {target}",
            )
        _export_model(checkpoint, target, form)
    elif form.merge is None:
        _export_adapter(checkpoint, target, form)
    else:
        _export_merged(checkpoint, target, form)


def _export_model(checkpoint: Checkpoint, target: Path, form: Form) -> None:
    wanted = DTYPES[form.dtype_of(checkpoint)]
    model = hollow_model(checkpoint, trust_remote_code=form.trust_remote_code)
    groups = weights_of(checkpoint, wanted)
    check_weights(checkpoint, groups, shapes_of(model), [name for name, _ in model.named_parameters()])

    def write(folder: Path) -> None:
        write_model(model, aliases_of(model), groups, folder, wanted, form.max_shard_size)
        _write_beside(checkpoint, folder, str(model.config.model_type), WHOLE)

    write_folder(target, write)


def _export_adapter(checkpoint: Checkpoint, target: Path, form: Form) -> None:
    wanted = DTYPES[form.dtype_of(checkpoint)]

    def write(folder: Path) -> None:
        write_adapter(checkpoint, folder, wanted, trust_remote_code=form.trust_remote_code)
        _write_beside(checkpoint, folder, "", adapter_part(words_of(folder)))

    write_folder(target, write)


def _export_merged(checkpoint: Checkpoint, target: Path, form: Form) -> None:
    assert form.merge is not None
    base = form.merge.base or base_name_of(checkpoint)
    with adapter_folder(checkpoint, trust_remote_code=form.trust_remote_code) as adapter:
        settings = ModelSettings(
            adapter_name_or_path=str(adapter),
            trust_remote_code=form.trust_remote_code,
            model_revision=checkpoint.manifest.config.get("model_revision"),
        )
        check = partial(check_base, checkpoint, name=base)
        made = merged(settings, base, form.dtype_of(checkpoint), check)
        hollow = made.hollow

        def write(folder: Path) -> None:
            write_model(hollow, aliases_of(hollow), made.groups, folder, made.dtype, form.max_shard_size)
            part = adapter_part(words_of(adapter), is_merged=True)
            _write_beside(checkpoint, folder, str(hollow.config.model_type), part)

        write_folder(target, write)


def _write_beside(checkpoint: Checkpoint, folder: Path, model_type: str, part: Part) -> None:
    """Write the tokenizer, its templates and a card."""
    manifest = checkpoint.manifest
    for name in manifest.small_files:
        is_known = name in CONFIGURATIONS or name in TRAINER_FILES or name == ADAPTER_CONFIG
        if not name.endswith(".safetensors") and not is_known:  # tokenizer and templates
            files.write_file(folder / name, read_small(checkpoint, name), below=folder)
    tokens = manifest.state.get("meter", {}).get("sums", [None])[0]
    card = model_card(
        manifest.config,
        model_type=model_type,
        step=manifest.step,
        num_tokens=tokens,
        versions=manifest.versions,
        part=part,
    )
    files.write_file(folder / "README.md", card)
