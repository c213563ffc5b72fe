"""The verbs of runs and their checkpoints: `horizon resume`, `horizon verify`, `horizon export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from horizon_lm.cli.base import SettingsArguments, SettingsCommand, split_arguments
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.io.output import lasting_output
from horizon_lm.words import count

RunOrCheckpoint = Annotated[str, typer.Argument(help="A run's output_dir, or one of its checkpoints.")]


class ResumeCommand(SettingsCommand):
    """A run, and settings that are to be others from now on."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["RUN", "[KEY=VALUE | --KEY VALUE]..."]


def resume(settings: SettingsArguments = None) -> None:
    """Go on with a run that was stopped or killed, or make a finished one longer.

    RUN is its output_dir (the latest valid checkpoint is taken), or a checkpoint in it. The run keeps its
    settings; key=value changes them. max_steps=N and num_train_epochs=N make the run longer or shorter;
    others that alter results need allow_changed_settings=true as well.
    """
    place, overrides = split_arguments(settings or ())
    if place is None:
        raise ConfigError("command line: 'resume' needs a run", "horizon resume RUN, with its output_dir")
    from horizon_lm.checkpoint.identify import identify, new_run

    looked = identify(place)
    if looked.kind == "run" and looked.is_finished and looked.model is not None and not overrides:
        print(f"{place}: {looked.what}")
        more = looked.step + max(1, looked.step // 10)
        if looked.checkpoints:
            print(f"to train further: horizon resume {place} max_steps={more}")
        else:
            print(f"it has no checkpoint to go on from; {new_run(looked)}")
        return
    from horizon_lm.config import TrainConfig
    from horizon_lm.training.run_settings import given_keys, read_settings, run_of

    folder, source = run_of(place)
    refused = given_keys(overrides) & {"output_dir", "resume_from_checkpoint"}
    if refused:
        raise ConfigError(
            f"command line: {' and '.join(sorted(refused))} cannot be given to resume, "
            f"which goes on in {folder}",
            hint=f"horizon train {folder}/config.resolved.yaml resume_from_checkpoint={place} output_dir=NEW",
        )
    own = [f"output_dir={folder}", f"resume_from_checkpoint={source}"]
    document, notes = read_settings(Path(folder), [*overrides, *own])
    config = TrainConfig.from_document(document)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    from horizon_lm.training.train import train

    train(config, config_notes=notes)


def verify(checkpoint: RunOrCheckpoint) -> None:
    """Check a checkpoint, or all of a run: checksums, tensor headers, numbers; exit code 5 for a fault."""
    from horizon_lm.checkpoint.identify import identify, no_checkpoint
    from horizon_lm.checkpoint.reader import verify as verify_checkpoint

    looked = identify(checkpoint)
    faults = [one.reason for one in looked.rejected]
    if not looked.checkpoints and not faults:
        raise no_checkpoint(looked, "verify")
    for one in looked.checkpoints:
        verdict = verify_checkpoint(one)
        state = "sound" if not verdict.faults else count(len(verdict.faults), "fault")
        with lasting_output():  # the answer is the exit code
            print(
                f"{one.path}: step {one.manifest.step}, {count(verdict.num_files, 'file')}, "
                f"{count(verdict.num_tensors, 'tensor')}, {count(verdict.num_bytes, 'byte')}: {state}"
            )
        faults += verdict.faults
    if faults:
        raise CheckpointError(
            "\n  ".join(faults),
            hint="'horizon resume' takes the latest sound one; 'horizon verify RUN' shows all",
        )


def export(
    checkpoint: RunOrCheckpoint,
    output: Annotated[str, typer.Argument(metavar="OUT", help="A folder that is new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; by default that of the run.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Write the model of a checkpoint in Hugging Face format, with tokenizer and model card."""
    import re

    if dtype not in (None, "bfloat16", "float32"):
        raise ConfigError(f"command line: --dtype is {dtype!r}", "bfloat16 or float32")
    if not re.fullmatch(r"[0-9]{0,6}[1-9][0-9]{0,6}(KB|MB|GB|TB)", max_shard_size):
        raise ConfigError(
            f"command line: --max-shard-size is {max_shard_size!r}", "a size such as 5GB or 500MB"
        )
    from horizon_lm.checkpoint.identify import identify, no_checkpoint

    looked = identify(checkpoint)
    if not looked.checkpoints and not looked.rejected:
        raise no_checkpoint(looked, "export")
    from horizon_lm.checkpoint.export import export_checkpoint

    with lasting_output():
        done = export_checkpoint(
            Path(checkpoint).expanduser(),
            Path(output).expanduser(),
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        )
        print(f"{done.path}, step {done.manifest.step}, is now {output}")
