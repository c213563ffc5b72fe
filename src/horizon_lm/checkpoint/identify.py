"""Identify a path that a command was given: a run and its progress, a checkpoint, a model, or neither.

`verify`, `export`, `resume`, `eval`, `generate` and `chat` share it, so that their answers agree. Imports
neither torch nor transformers.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint import manifest
from horizon_lm.checkpoint.folder import Checkpoint, Rejected, RunFolder
from horizon_lm.config.adapters import OF_NEW, AdapterSettings
from horizon_lm.errors import CheckpointError, ConfigError, HorizonError
from horizon_lm.io import files
from horizon_lm.io.hub import REPOSITORY
from horizon_lm.text import shown

Kind = Literal["run", "checkpoint", "model", "configuration", "file", "empty", "folder", "absent"]

_NOT_OF_A_NEW_RUN = (
    *("init_model", "train_tokenizer_vocab_size", "tokenizer_name_or_path", "model_revision"),
    "resume_from_checkpoint",
)


@dataclass(frozen=True)
class Identified:
    """What `path` is.

    checkpoints: those with a valid manifest and files of the right size, latest first; rejected: the others.
    model: the folder of a complete model, if any. step, num_steps: progress of a run by its metrics, else of
    a checkpoint. is_finished: all steps of the run are done.
    """

    path: Path
    kind: Kind
    checkpoints: tuple[Checkpoint, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    model: Path | None = None
    step: int = 0
    num_steps: int | None = None
    is_finished: bool = False

    @property
    def what(self) -> str:
        """What it is, to follow its path and a colon."""
        if self.kind == "run":
            return self._run()
        return {
            "checkpoint": f"it is a checkpoint of step {self.step:,}",
            "model": f"it is {self._kind_of_model()} in Hugging Face format",
            "configuration": "it is a configuration file",
            "file": "it is a file, not a folder",
            "empty": "the folder is empty",
            "folder": "there is neither a run (config.resolved.yaml) nor a model (config.json) in it",
            "absent": "it does not exist",
        }[self.kind]

    @property
    def is_adapter(self) -> bool:
        """Whether its model is an adapter, without the base."""
        return self.model is not None and has_adapter(self.model)

    def _kind_of_model(self) -> str:
        return "an adapter" if self.is_adapter else "a model"

    def _run(self) -> str:
        of = f" of {self.num_steps:,}" if self.num_steps is not None else ""
        if self.is_finished and self.model is not None:
            kind = "adapter" if self.is_adapter else "model"
            return f"this run is finished ({self.step:,}{of} steps); its {kind} is in {self.model}"
        done = "all steps of this run are done" if self.is_finished else "this run is not finished"
        found = f"{done} (step {self.step:,}{of})"
        if self.checkpoints:
            return f"{found}; its latest checkpoint is {self.checkpoints[0].path}"
        if self.rejected:
            return f"{found}; no checkpoint of it is sound: {'; '.join(one.reason for one in self.rejected)}"
        return f"{found} and has no checkpoint"


def identify(place: str | Path) -> Identified:
    """Identify `place` from small files alone. Never raises for what it finds."""
    path = Path(place).expanduser()
    if not path.is_dir():
        if not path.exists():
            return Identified(path, "absent")
        return Identified(path, "configuration" if path.suffix in (".yaml", ".yml") else "file")
    if (path / manifest.NAME).exists() or checkpoints.is_name(path.name):
        return _checkpoint(path)
    run = RunFolder(path)
    found, rejected = checkpoints.list_checkpoints(path)
    if run.settings.is_file() or found or rejected:
        step, num_steps, is_finished = _progress(run.metrics)
        model = run.model if has_model(run.model) else None
        if found and step < found[0].manifest.step:  # a run without its metrics
            step = found[0].manifest.step
        return Identified(path, "run", tuple(found), tuple(rejected), model, step, num_steps, is_finished)
    for folder in (path, run.model):  # the second: a run folder of which only the model was kept
        if (folder / "config.json").is_file() or has_adapter(folder):
            return Identified(path, "model", model=folder)
    return Identified(path, "folder" if any(path.iterdir()) else "empty")


def has_model(folder: Path) -> bool:
    """Tell whether a folder holds a model with its weights, or an adapter."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) or has_adapter(folder)


def has_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of PEFT with its weights, and no model."""
    names = (checkpoints.ADAPTER_CONFIG, checkpoints.ADAPTER_WEIGHTS)
    return all((folder / name).is_file() for name in names) and not (folder / "config.json").exists()


def may_be_on_hub(name: str) -> bool:
    """Tell whether `name`, which is not a local path, may be on the Hub: owner/name, or a name alone."""
    return bool(REPOSITORY.fullmatch(name)) and not name.endswith((".yaml", ".yml", ".jsonl", ".json"))


def _checkpoint(path: Path) -> Identified:
    try:
        found = checkpoints.open_checkpoint(path)
    except CheckpointError as error:
        return Identified(path, "checkpoint", rejected=(Rejected(path, error.message),))
    return Identified(path, "checkpoint", (found,), step=found.manifest.step)


def _progress(metrics: Path) -> tuple[int, int | None, bool]:
    """Return (last step, total steps, whether the last line says that the run is finished)."""
    step, num_steps, is_finished = 0, None, False
    try:
        with io.TextIOWrapper(files.open_file(metrics), encoding="utf-8") as file:
            for text in file:
                line = _event(text)
                kind = line.get("event")
                if kind == "start":
                    num_steps = None if line.get("num_steps") is None else int(line["num_steps"])
                elif kind in ("step", "resume", "rollback"):
                    step = int(line.get("step", 0))
                if kind is not None:
                    is_finished = kind == "end" and line.get("status") == "finished"
    except (OSError, ValueError, TypeError, OverflowError):
        pass
    return step, num_steps, is_finished


def _event(text: str) -> dict[str, Any]:
    """Parse a line of the metrics; empty for an irrelevant line and for one that was cut off."""
    if '"timeline"' in text[:40] or not text.endswith("\n"):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_trainer(found: Iterable[Checkpoint]) -> None:
    """Raise CheckpointError for a checkpoint of a Trainer, which alone knows its place in the data."""
    for checkpoint in found:
        trainer = checkpoint.manifest.state.get("trainer")
        if trainer is not None:
            raise CheckpointError(
                f"{checkpoint.path} is a checkpoint of {shown(str(trainer))}, not of `horizon train`",
                hint="trainer.train(resume_from_checkpoint=True) in its script; or "
                f"horizon export {checkpoint.path} OUT, then model_name_or_path=OUT",
            )


# Errors for what is missing, shared by all commands.


def no_checkpoint(place: Identified, verb: str) -> CheckpointError:
    """Return the error of `horizon VERB PLACE` if there is no checkpoint to use."""
    if place.kind == "checkpoint":
        return CheckpointError(
            "; ".join(one.reason for one in place.rejected),
            hint=f"'horizon {verb} RUN', with the folder of the run, takes the latest sound one",
        )
    if place.kind == "run" and place.rejected:
        return checkpoints.none_valid(place.path, place.rejected)
    return CheckpointError(
        f"{place.path} holds no checkpoint: {place.what}", hint=_no_checkpoint_hint(place, verb)
    )


def _no_checkpoint_hint(place: Identified, verb: str) -> str:
    if place.kind == "run":
        settings = RunFolder(place.path).settings
        if place.model is None:
            return f"begin again: horizon train {settings} overwrite_output_dir=true"
        if verb == "resume":
            return new_run(place)
        return f"'horizon chat {place.path}' and 'horizon eval {place.path}' take the model as it is"
    if place.kind == "model":
        return f"'horizon chat {place.path}' and 'horizon eval {place.path}' take it as it is"
    return _elsewhere(place, verb, "a run's output_dir, or a checkpoint in it")


def new_run(place: Identified) -> str:
    """Return a hint how to train a run's model further without a checkpoint."""
    settings = RunFolder(place.path).settings
    written = _values(settings)
    off = "".join(f" {key}=null" for key in _NOT_OF_A_NEW_RUN if written.get(key) is not None)
    key = "adapter_name_or_path" if place.is_adapter else "model_name_or_path"
    if place.is_adapter:  # whose configuration says what these would
        fields = AdapterSettings.model_fields
        defaults = {k: fields[k].default for k in OF_NEW}
        back = {k: value for k, value in defaults.items() if written.get(k, value) != value}
        off = "".join(f" {k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in back.items())
    return (
        f"a new run can begin with its model: horizon train {settings} {key}={place.model}{off} "
        "output_dir=NEW; save_last=true keeps a checkpoint of the end"
    )


def no_model(place: Identified, verb: str) -> HorizonError:
    """Return the error of `horizon VERB PLACE` if there is no model to use."""
    if place.kind in ("checkpoint", "run") and place.checkpoints:
        return ConfigError(
            f"{place.path} holds no model yet: {place.what}",
            hint=f"horizon export {place.path} OUT, then horizon {verb} OUT"
            + (f"; or finish the run: horizon resume {place.path}" if place.kind == "run" else ""),
        )
    hint = _elsewhere(
        place, verb, "a folder in Hugging Face format, a run's output_dir, or a name on the Hub"
    )
    if place.kind == "run":
        hint = f"begin again: horizon train {RunFolder(place.path).settings} overwrite_output_dir=true"
    reasons = "; ".join(one.reason for one in place.rejected) if place.kind == "checkpoint" else place.what
    return ConfigError(f"{place.path} holds no model: {reasons}", hint=hint)


def no_settings(name: str) -> ConfigError:
    """Return the error for a folder in place of a configuration file."""
    place = identify(name)
    hint = "give the path of a YAML file, or key=value pairs"
    if place.kind == "run" and RunFolder(place.path).settings.is_file():
        hint = (
            f"horizon resume {place.path} trains further; its settings are {RunFolder(place.path).settings}"
        )
    elif place.kind == "model":
        hint = f"model_name_or_path={place.model}"
    return ConfigError(f"{name} is a folder, not a configuration file: {place.what}", hint=hint)


def check_is_model(key: str, name: str | None) -> None:
    """Raise ConfigError if a setting for a model names a run or a checkpoint."""
    place = identify(name) if name is not None else None
    if place is None or place.kind not in ("run", "checkpoint"):
        return
    hint = f"{key}={place.model}"
    if place.is_adapter and key == "model_name_or_path":
        hint = (
            f"horizon export {place.path} OUT --merge, then {key}=OUT; or adapter_name_or_path={place.model}"
        )
    if place.model is None:
        hint = f"horizon export {place.path} OUT, then {key}=OUT"
    raise ConfigError(f"{key}={name!r} is not the folder of a model: {place.what}", hint=hint)


def _elsewhere(place: Identified, verb: str, wanted: str) -> str:
    if place.kind == "configuration":
        output = _output_dir(place.path)
        if output is not None and output.is_dir():
            return f"horizon {verb} {output}, the folder of its run"
    if place.kind == "absent":
        return f"give {wanted}; looked in {os.getcwd()}"
    return f"give {wanted}"


def _output_dir(path: Path) -> Path | None:
    """Return the output_dir of a configuration file."""
    found = _values(path).get("output_dir")
    return Path(found).expanduser() if isinstance(found, str) else None


def _values(path: Path) -> dict[str, Any]:
    """Return the values of a configuration file; none if it cannot be read."""
    from horizon_lm.config.yaml import read_file

    try:
        return read_file(path).values
    except ConfigError:
        return {}
