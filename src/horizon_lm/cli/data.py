"""The verbs before training: `horizon data preview`, `horizon init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from horizon_lm.cli.run import (
    PASS_OPTIONS,
    SettingsArguments,
    SettingsCommand,
    load_settings,
    require_named_model,
)
from horizon_lm.errors import ConfigError
from horizon_lm.io.hub import require_model
from horizon_lm.io.output import lasting_output

if TYPE_CHECKING:
    from horizon_lm.data import TrainingData

data_app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)


@data_app.callback()
def _data() -> None:
    """Keep `preview` a verb although it is the only one."""


@data_app.command("preview", cls=SettingsCommand, context_settings=PASS_OPTIONS)
def preview(
    settings: SettingsArguments = None,
    samples: Annotated[int, typer.Option(min=0, help="Sequences to show.")] = 3,
    images: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw a sheet of thumbnails of the data's pictures."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead.")] = False,
) -> None:
    """Show what a run would train on.

    Samples with the trained tokens marked, lengths, packing, omitted rows and why.

    Reads and tokenises the data as training does, and caches the tokens for it; loads no model.
    """
    config, _ = load_settings(settings)
    require_named_model(config)
    from horizon_lm.data import load_training_data
    from horizon_lm.data.preview import print_preview, summary_json

    data = load_training_data(config)
    if config.tokens_per_step is not None:
        from horizon_lm.training.prepare import wanted_rows

        data.loader.cut(wanted_rows(config, data), 1)
    if as_json:
        print(summary_json(data))
    else:
        print_preview(data, samples, sys.stdout)
    if images is not None:
        _draw(data, images)


def _draw(data: TrainingData, target: Path) -> None:
    """Write a sheet of thumbnails. Raises ConfigError if there are no pictures, or no file."""
    if data.rows.store.pictures is None:
        raise ConfigError("--images: the data has no pictures", hint="leave it out")
    from horizon_lm.data.thumbnails import sheet
    from horizon_lm.io.files import write_output

    try:
        write_output(target, sheet(data.rows, data.tokenizer))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}", "choose another file") from error
    print(f"thumbnails: {target}", file=sys.stderr)


def init(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to write, as for train.")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Folder or Hub name of the model to train.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data. Repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write.  [default: horizon.yaml, or NAME.yaml]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    example: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write a ready-made configuration instead: quickstart, sft, ..."),
    ] = None,
) -> None:
    """Write a commented configuration for a model and data.

    adapter=lora (and base_dtype=nf4) writes one for LoRA (or QLoRA); --example, a ready-made one.
    """
    if example is not None:
        is_alone = model is None and not dataset and not settings
        _write_example(example, output, overwrite, is_alone=is_alone)
        return
    if model is None or not dataset:
        missing = "--model" if model is None else "--dataset"
        raise ConfigError(
            f"command line: 'init' needs {missing}",
            hint="write horizon init --model PATH --dataset FILE, or horizon init --example quickstart",
        )
    require_model(model, "--model")
    from horizon_lm.cli.init import write_config

    with lasting_output():
        target = output or Path("horizon.yaml")
        for line in write_config(model, dataset, target, overwrite=overwrite, settings=settings or ()):
            print(line)


def _write_example(name: str, output: Path | None, overwrite: bool, *, is_alone: bool) -> None:
    """Copy a configuration of the package. Raises ConfigError."""
    from horizon_lm.checkpoint.folder import writing
    from horizon_lm.config.shipped import text_of
    from horizon_lm.io.files import write_output

    if not is_alone:
        raise ConfigError(
            "command line: --example is a whole configuration",
            hint="leave out --model, --dataset and settings, and change the file",
        )
    text, target = text_of(name), output or Path(f"{name}.yaml")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists", hint="add --overwrite, or -o FILE")
    with writing(target, "choose another file with -o FILE"):
        write_output(target, text)
    with lasting_output():
        print(f"written: {target}\nnext: horizon train {target}")
