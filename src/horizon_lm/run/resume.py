"""Going on from a checkpoint: which one, whether the settings still fit it, and the state put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import folder as checkpoints
from ..checkpoint import units
from ..checkpoint.disk import checksum
from ..checkpoint.folder import Checkpoint, Rejected
from ..checkpoint.manifest import Manifest
from ..checkpoint.reader import load_units, read_small
from ..checkpoint.writer import BUFFERS
from ..config import TrainConfig
from ..errors import CheckpointError, ConfigError, DataError
from .folder import RunFolder
from .host_model import HostModel
from .loop import LoopState

LATEST, AUTO = "latest", "auto"

# Settings that change where bytes are, when work is done, or what is reported, and never a bit of the result
# (tests/test_lanes.py, tests/test_resume.py), and those that only decide what a fault leads to.
FREE = frozenset(
    {
        *("lanes", "slots", "grad_slots", "grad_slabs", "boundary_slots", "boundaries", "activations"),
        *("checkpoint_interval", "optimizer_threads", "update", "reserve_host_gb", "skip_memory_check"),
        *("trust_remote_code", "dataset_num_proc", "dataset_cache_dir", "dataloader_num_workers"),
        *("eval_datasets", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size"),
        *("output_dir", "overwrite_output_dir", "run_name", "logging_steps", "report_to", "project"),
        *("peak_tflops", "plot_loss", "save_dtype", "max_shard_size", "sample_prompt"),
        *("sample_max_new_tokens", "progress"),
        *("save_strategy", "save_steps", "save_minutes", "save_first_step", "save_total_limit"),
        *("save_keep_every", "save_in_background", "save_on_signal", "save_patience_seconds"),
        *("max_failed_saves", "resume_from_checkpoint", "allow_changed_settings", "deadline_minutes"),
        *("nonfinite", "max_skipped_steps", "loss_spike", "loss_spike_sigmas", "loss_spike_window"),
        *("max_rollbacks", "allow_missing", "allow_unexpected"),
    }
)
# Settings that the bytes of a checkpoint depend on: no yes helps.
FIXED = frozenset({"dtype", "moment_dtype", "optim", "init_model", "freeze", "new_tokens"})


@dataclass(frozen=True)
class Resume:
    """checkpoints: what can be resumed from, best first. in_place: they lie in the run's own folder, whose
    metrics go on."""

    checkpoints: tuple[Checkpoint, ...]
    in_place: bool


def wants_own_folder(config: TrainConfig) -> bool:
    """Whether the run may go on in an output_dir that holds it already."""
    source = config.resume_from_checkpoint
    if source in (LATEST, AUTO):
        return True
    return source is not None and _lies_in(Path(source).expanduser(), Path(config.output_dir).expanduser())


def find(config: TrainConfig, folder: RunFolder, warn: Callable[[str], None]) -> Resume | None:
    """What the settings ask to resume from; None for a new run. Raises CheckpointError, ConfigError."""
    source = config.resume_from_checkpoint
    if source is None:
        return None
    place = folder.path if source in (LATEST, AUTO) else Path(source).expanduser()
    if source == AUTO:
        found, rejected = checkpoints.list_checkpoints(place)
        if not found and not rejected:
            return None
    elif source == LATEST and not place.is_dir():
        raise CheckpointError(
            f"{place} holds no checkpoint", hint="resume_from_checkpoint=auto starts a new run"
        )
    found = checkpoints.candidates(place, warn)
    check_settings(config, found[0].manifest.config)
    return Resume(tuple(found), _lies_in(place, folder.path))


def _lies_in(place: Path, run: Path) -> bool:
    return place.resolve() in (run.resolve(), *(p.resolve() for p in run.glob("checkpoint-*")))


def check_settings(config: TrainConfig, then: dict[str, Any]) -> None:
    """Raises ConfigError, naming them, for settings that alter results and are not what they were."""
    now = config.to_dict()
    defaults = {key: TrainConfig.model_fields[key].default for key in now}  # of settings that came later
    before = {key: then.get(key, defaults[key]) for key in now}
    changed = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    for title, keys, hint in (
        (
            "cannot be changed in a run",
            FIXED,
            "start a new run: model_name_or_path=RUN/model, another output_dir",
        ),
        (
            "alter the results of the run that is resumed",
            now.keys() - FREE - FIXED,
            "allow_changed_settings=true resumes with the new values",
        ),
    ):
        named = [key for key in now if key in changed and key in keys]
        if named and not (config.allow_changed_settings and keys != FIXED):
            parts = [f"{key} was {_short(changed[key][0])}, is {_short(changed[key][1])}" for key in named]
            raise ConfigError(f"settings that {title}: {'; '.join(parts)}", hint=hint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def restore(
    resume: Resume,
    model: HostModel,
    load_state: Callable[[Manifest], None],
    small_files: Mapping[str, bytes],
    warn: Callable[[str], None],
) -> Checkpoint:
    """Put the model and (`load_state`) the trainer back to the best checkpoint whose content is right.

    small_files: configuration and tokenizer of now. Raises CheckpointError where no content is right,
    DataError where the data or the tokenizer have changed.
    """
    rejected = []
    for checkpoint in resume.checkpoints:
        try:
            load_checkpoint(checkpoint, model)
            _check_tokenizer(checkpoint, small_files)
            try:
                load_state(checkpoint.manifest)
            except DataError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{checkpoint.path}: its state cannot be read: {error!r}") from error
            return checkpoint
        except CheckpointError as error:
            warn(f"passed over {error.message}")
            rejected.append(Rejected(checkpoint.path, error.message))
    raise checkpoints.none_valid(resume.checkpoints[0].path.parent, rejected)


def _check_tokenizer(checkpoint: Checkpoint, small_files: Mapping[str, bytes]) -> None:
    """Other words for the same numbers would go unnoticed by a look at the numbers."""
    name = "tokenizer.json"
    _, then = checkpoint.manifest.files.get(name, (0, None))
    if then is not None and name in small_files and checksum(small_files[name]) != then:
        raise DataError(
            f"the tokenizer is not the one that {checkpoint.path} was trained with",
            hint="restore the data, the tokenizer and the settings of the group Data, or start a new run",
        )


def load_checkpoint(checkpoint: Checkpoint, model: HostModel) -> None:
    """Fill the model's store and buffers. Raises CheckpointError."""
    load_units(checkpoint, model.store)
    rows = saved_buffers(model)
    path = checkpoint.path / BUFFERS
    read_small(checkpoint, BUFFERS)  # checks it
    with open(path, "rb") as file:
        units.read(file.fileno(), rows, str(path))
    for (name, value), (_, buffer) in zip(rows, _persistent_buffers(model), strict=True):
        assert value.shape == buffer.shape, name
        buffer.copy_(value)
    try:
        steps_done = int(checkpoint.manifest.state["steps_done"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{checkpoint.path}: its state has no steps_done") from None
    model.state_was_replaced(steps_done)


def saved_buffers(model: HostModel) -> list[tuple[str, torch.Tensor]]:
    """Copies, in host memory, of the buffers that belong to the saved model."""
    return [(name, b.detach().cpu().contiguous().clone()) for name, b in _persistent_buffers(model)]


def _persistent_buffers(model: HostModel) -> Sequence[tuple[str, torch.Tensor]]:
    module = model.skeleton.model
    found = []
    for name, buffer in module.named_buffers(remove_duplicate=False):
        path, _, local = name.rpartition(".")
        if local not in module.get_submodule(path)._non_persistent_buffers_set:
            found.append((name, buffer))
    return found


def loop_state(state: dict[str, Any]) -> LoopState:
    return LoopState(**{key: int(state["loop"][key]) for key in ("step", "skipped_in_a_row", "rollbacks")})


def run_of(place: str) -> tuple[str, str]:
    """(output_dir, resume_from_checkpoint) for `horizon resume PLACE`, a run or one of its checkpoints.

    Raises CheckpointError where it is neither.
    """
    path = Path(place).expanduser()
    if (path / "manifest.json").is_file():
        return str(path.resolve().parent), str(path)
    if not path.is_dir():
        raise CheckpointError(f"{place!r} is no folder", hint="name a run's output_dir or a checkpoint in it")
    if not (path / "config.resolved.yaml").is_file():
        raise CheckpointError(
            f"{place!r} holds no run: config.resolved.yaml is missing",
            hint=f"looked in {os.path.abspath(place)}",
        )
    return str(path), LATEST
