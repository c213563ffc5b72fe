"""The verbs of a run, `train`, `resume`, `verify` and `export`, and how any verb takes settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.io.output import lasting_output
from horizon_lm.words import count

if TYPE_CHECKING:
    from horizon_lm.config import TrainConfig

HELP = {"help_option_names": ["-h", "--help"]}
PASS_OPTIONS = {**HELP, "ignore_unknown_options": True}

SettingsArguments = Annotated[list[str] | None, typer.Argument(hidden=True)]


class SettingsCommand(TyperCommand):
    """A verb that takes a configuration file and overrides."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml]", "[KEY=VALUE | --KEY VALUE]..."]


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the arguments of a verb into configuration file and overrides (`key=value`)."""
    config: str | None = None
    overrides: list[str] = []
    rest = iter(_with_resume(arguments))
    for argument in rest:
        name = argument.partition("=")[0]
        if argument.startswith("--") and "=" not in argument:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"command line: '{argument}' has no value", f"write {argument}=VALUE")
            overrides.append(f"{argument}={value}")
        elif argument.startswith("--") or "=" in argument and "/" not in name and os.sep not in name:
            overrides.append(argument)
        elif argument.startswith("-") and argument != "-":
            raise ConfigError(
                f"command line: '{argument}' is not an option", "write settings as key=value or --key value"
            )
        elif config is not None:
            hint = "write settings as key=value, and quote text with spaces"
            raise ConfigError(f"command line: '{argument}' is neither key=value nor the only file", hint)
        else:
            config = argument
    return config, overrides


def _with_resume(arguments: Sequence[str]) -> list[str]:
    """Expand a `--resume` without a value: the latest checkpoint of output_dir."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if argument != "--resume":
            continue
        following = found[i + 1] if i + 1 < len(found) else "--"
        is_value = not following.startswith("-") and "=" not in following
        found[i] = "--resume_from_checkpoint"
        if not is_value or following.endswith((".yaml", ".yml")):
            found[i] += "=latest"
    return found


def load_settings(arguments: Sequence[str] | None) -> tuple[TrainConfig, list[str]]:
    """Read the settings of a verb and print notes about aliases. Raises ConfigError."""
    from horizon_lm.config import load_config
    from horizon_lm.config.shipped import located

    place, overrides = split_arguments(arguments or ())
    if place is not None and os.path.isdir(place) and located(place) == place:
        from horizon_lm.checkpoint.identify import no_settings

        raise no_settings(place)
    config, notes = load_config(place, overrides)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config, notes


def require_named_model(config: TrainConfig) -> None:
    """Raise ConfigError for a model that is nowhere, before any library is imported."""
    from horizon_lm.io.hub import require_model

    if config.init_model is None and config.model_name_or_path is not None:
        require_model(config.model_name_or_path, "model_name_or_path")


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless an option has one of its words."""
    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known", f"one of {', '.join(known)}")


class TrainCommand(SettingsCommand):
    """`train`, whose help ends with all settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from horizon_lm.config.reference import settings_help

        super().format_help(ctx, formatter)
        formatter.write("\n" + settings_help(max(60, min(formatter.width, 110))))


def train(
    settings: SettingsArguments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, build, check and simulate a step; train nothing.")
    ] = False,
) -> None:
    """Train a model and save it in Hugging Face format.

    Settings come from CONFIG.yaml, if given; key=value, --key value or --key=value override it.

    On several GPUs: torchrun --nproc-per-node N -m horizon_lm train CONFIG.yaml, with the same bits as on
    one. torchrun itself exits with 1 for any exit code of a rank, also for 75 and 130 (stopped and saved).
    """
    config, notes = load_settings(settings)
    if config.resume_from_checkpoint is None:  # a checkpoint can replace the model's folder
        require_named_model(config)
    if dry_run:
        from horizon_lm.training.prepare import dry_run as run_dry

        return print(run_dry(config))
    from horizon_lm.training.train import train as run_training

    run_training(config, config_notes=notes)


RunOrCheckpoint = Annotated[str, typer.Argument(help="A run's output_dir, or one of its checkpoints.")]


class ResumeCommand(SettingsCommand):
    """`resume`, which takes a run and changed settings."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["RUN", "[KEY=VALUE | --KEY VALUE]..."]


def resume(settings: SettingsArguments = None) -> None:
    """Resume a stopped or killed run, or extend a finished one.

    RUN is its output_dir (uses the latest valid checkpoint) or a checkpoint in it. The run keeps its
    settings; key=value changes them. max_steps=N and num_train_epochs=N make the run longer or shorter;
    other settings that alter results need allow_changed_settings=true as well.
    """
    place, overrides = split_arguments(settings or ())
    if place is None:
        raise ConfigError("command line: 'resume' needs a run", "write horizon resume RUN")
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
            f"command line: resume does not take {' and '.join(sorted(refused))}: it continues in {folder}",
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
    """Check a checkpoint, or all those of a run.

    Checksums, tensor headers, numbers; exit code 5 if corrupt.
    """
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
            hint="use 'horizon resume', which takes the latest sound one; 'horizon verify RUN' checks all",
        )


def export(
    checkpoint: RunOrCheckpoint,
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; the run's by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    merge: Annotated[
        bool, typer.Option("--merge", help="Add an adapter to the weights of its base: a plain model.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="With --merge: the base, if it is no longer where the run read it.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that ships with the model.")
    ] = False,
) -> None:
    """Write a model in Hugging Face format from a checkpoint.

    With tokenizer and model card.

    Of a run with an adapter this is PEFT's folder; --merge writes a model that needs no adapter, from the
    base in its own precision. --merge also takes PEFT's folder in place of a run.
    """
    import re

    if dtype not in (None, "bfloat16", "float32"):
        raise ConfigError(f"command line: --dtype is {dtype!r}", "use bfloat16 or float32")
    if not re.fullmatch(r"[0-9]{0,6}[1-9][0-9]{0,6}(KB|MB|GB|TB)", max_shard_size):
        raise ConfigError(
            f"command line: --max-shard-size is {max_shard_size!r}", "use a size such as 5GB or 500MB"
        )
    from horizon_lm.checkpoint.identify import identify, no_checkpoint

    if base is not None and not merge:
        raise ConfigError("command line: --base is given without --merge", "add --merge, or leave --base out")
    looked = identify(checkpoint)
    is_folder = not looked.checkpoints and not looked.rejected
    if is_folder and not (merge and looked.is_adapter):
        if merge and looked.model is not None:
            raise ConfigError(
                f"{looked.model} is a whole model: there is no adapter to merge",
                hint="use it as it is: --merge is for runs with an adapter",
            )
        raise no_checkpoint(looked, "export")
    from horizon_lm.checkpoint.exported import Form, Merge, export_checkpoint, merge_folder

    target = Path(output).expanduser()
    form = Form(dtype, max_shard_size, trust_remote_code, Merge(base) if merge else None)
    with lasting_output():
        if is_folder:
            assert looked.model is not None
            name = merge_folder(looked.model, target, form)
            return print(f"exported {looked.model}, merged into {name}, to {output}")
        done = export_checkpoint(
            looked.path,
            target,
            form,
            warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        )
        print(f"exported {done.path} (step {done.manifest.step}) to {output}")
