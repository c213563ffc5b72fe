"""Find the checkpoint that a Trainer resumes from, and load it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.disk import damaged
from horizon_lm.checkpoint.folder import ADAPTER_CONFIG, Checkpoint, Rejected, candidates, is_name, none_valid
from horizon_lm.checkpoint.manifest import NAME as MANIFEST
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.checkpoint.units import persistent_buffers
from horizon_lm.errors import CheckpointError, OtherBaseError
from horizon_lm.host_model import HostModel
from horizon_lm.model.adapter_files import read_adapter_weights
from horizon_lm.model.loading import load_model_of
from horizon_lm.trainers.trainer_state import load_state
from horizon_lm.training.resume import load_checkpoint

_PICKLED = ("optimizer.pt", "optimizer.bin", "scheduler.pt")  # what Trainer itself leaves in a checkpoint


@dataclass(frozen=True)
class Resumed:
    """A checkpoint in the model. state: of the trainer, see `trainer_state`."""

    path: Path
    state: Mapping[str, Any]


def load(
    source: bool | str | os.PathLike[str], output_dir: str, host: HostModel, warn: Callable[[str], None]
) -> Resumed:
    """Load a checkpoint into the model. source: its folder, that of its run, or True for `output_dir` (also
    "True", as a command line has it).

    Of a run, the latest intact one is taken; `warn` is told of others. Raises CheckpointError.
    """
    place = Path(output_dir if source in (True, "True", "true") else str(source)).expanduser()
    foreign = list(_foreign(place))
    if foreign and (place in foreign or not any(_ours(place))):
        raise _not_ours(foreign[-1])
    rejected = []
    found = candidates(place, warn)
    for checkpoint in found:
        try:
            return _load(checkpoint, host)
        except CheckpointError as error:
            if len(found) == 1 or isinstance(error, OtherBaseError):
                raise
            warn(f"skipped {error.message}")
            rejected.append(Rejected(checkpoint.path, error.message))
    raise none_valid(place, rejected)


def _load(checkpoint: Checkpoint, host: HostModel) -> Resumed:
    if "trainer" not in checkpoint.manifest.state:
        raise CheckpointError(
            f"{checkpoint.path} is a checkpoint of `horizon train`, not of a Trainer",
            hint=f"horizon resume {checkpoint.path.parent}; or horizon export {checkpoint.path} OUT, and "
            "pass OUT as the model",
        )
    for name in checkpoint.manifest.small_files:  # before the model is touched
        read_small(checkpoint, name)
    try:
        state = load_state(checkpoint, host.device)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(checkpoint.path, f"its state cannot be read: {error!r}") from error
    load_checkpoint(checkpoint, host)
    return Resumed(checkpoint.path, state)


def _folders(place: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run by step, or `place` itself if it is none."""
    if not is_name(place.name) and place.is_dir():
        found = [path for path in place.iterdir() if is_name(path.name) and path.is_dir()]
        if found:
            yield from sorted(found, key=lambda path: int(path.name.split("-")[1]))
            return
    yield place


def _ours(place: Path) -> Iterator[Path]:
    return (path for path in _folders(place) if (path / MANIFEST).exists())


def _foreign(place: Path) -> Iterator[Path]:
    """Yield folders that a Trainer could have written, without our manifest."""
    for path in _folders(place):
        has_model = any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
        if has_model and not (path / MANIFEST).exists():
            yield path


def _not_ours(path: Path) -> CheckpointError:
    pickled = next((name for name in _PICKLED if (path / name).is_file()), None)
    if pickled is not None:
        what = f"is a checkpoint of transformers' own Trainer, whose {pickled} is a pickle and is not read"
    else:
        held = "a model" if (path / "config.json").is_file() else "an adapter"
        what = f"holds {held} without the optimizer's state (save_only_model)"
    return CheckpointError(
        f"{path} {what}", hint=f"start a new run from its weights: pass {path} as the trainer's model"
    )


def load_weights(folder: Path, host: HostModel) -> None:
    """Fill the model, or its adapter, with the weights of a folder of it; the optimizer's state stays.

    Raises CheckpointError for a folder of another model.
    """
    adapter, buffers = host.skeleton.adapter, {}
    if adapter is not None:
        saved, names = read_adapter_weights(str(folder), adapter.config), adapter.names_in_files()
        weights = {names[key]: value for key, value in saved.items() if key in names}
        wanted = set(names.values())
    else:
        source = load_model_of(folder, host.settings)
        weights = {name: parameter.data for name, parameter in source.named_parameters()}
        wanted, buffers = set(host.store.names()), dict(source.named_buffers())
    missing = sorted(wanted - weights.keys())
    if missing:
        raise damaged(folder, f"has no weights of {missing[0]}")
    for name in sorted(wanted):
        found, expected = list(weights[name].shape), list(host.store.locate(name)[1].shape)
        if found != expected:
            raise CheckpointError(
                f"{folder} has {name} in the shape {found}, and the model has it as {expected}",
                hint="load a folder that this trainer saved",
            )
    host.state_is_being_replaced()
    for name in sorted(wanted):
        host.store.adopt(name, weights[name])
    for name, buffer in persistent_buffers(host.skeleton.model) if adapter is None else ():
        buffer.copy_(buffers[name])
    host.state_was_replaced(host.steps_done)
