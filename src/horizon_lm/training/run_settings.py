"""The settings in a run's folder, wherever the folder and we are by now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from horizon_lm.checkpoint import places
from horizon_lm.checkpoint.run_folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.config.aliases import canonical_name
from horizon_lm.config.base import collect, keys_of
from horizon_lm.config.yaml import Document, split_override
from horizon_lm.errors import CheckpointError
from horizon_lm.training import paths
from horizon_lm.training.resume import LATEST


def run_of(place: str) -> tuple[str, str]:
    """(output_dir, resume_from_checkpoint) for `horizon resume PLACE`, a run or one of its checkpoints.

    Raises CheckpointError where it is neither.
    """
    looked = places.look(place)
    path = looked.path
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
        raise places.no_checkpoint(looked, "resume")
    if looked.kind == "checkpoint":
        raise places.no_checkpoint(looked, "resume")
    return str(path), LATEST


def read_settings(run: Path, overrides: Sequence[str]) -> tuple[Document, list[str]]:
    """The settings in a run's folder with `overrides` on top, files found again, and notes on aliases."""
    path = RunFolder(run).settings
    document, notes = collect(path, overrides, keys_of(TrainConfig))
    given = given_keys(overrides)
    recorded, _ = collect(path, (), keys_of(TrainConfig))
    moved = paths.located(recorded.values, run)
    document.values.update({key: value for key, value in moved.items() if key not in given})
    if "num_train_epochs" in given and "max_steps" not in given and document.values.get("max_steps", -1) > 0:
        notes.append(
            f"'num_train_epochs' stands in place of the run's max_steps={document.values['max_steps']}"
        )
        document.values["max_steps"] = -1
    return document, notes


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The settings that `overrides` name, by their canonical names."""
    return {canonical_name(split_override(text)[0][0]) for text in overrides}
