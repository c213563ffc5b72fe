"""The command `horizon`: each verb parses, makes a configuration, and makes one call.

Torch, transformers and pydantic are imported by the verbs that need them, so that help answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from horizon_lm.errors import ConfigError, HorizonError

if TYPE_CHECKING:
    from horizon_lm.config import TrainConfig

_HELP = {"help_option_names": ["-h", "--help"]}
_PASS_OPTIONS = {**_HELP, "ignore_unknown_options": True}
_ENV_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "datasets", "numpy"),
    *("pydantic", "PyYAML", "typer", "rich", "matplotlib"),
)

Settings = Annotated[list[str] | None, typer.Argument(hidden=True)]

app = typer.Typer(
    name="horizon",
    help="Train large language models on one GPU, with the weights in host memory.",
    epilog="--debug, anywhere, shows a traceback with every error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Show, check and document settings.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")


class SettingsCommand(TyperCommand):
    """A verb that takes a configuration file and overrides."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml]", "[KEY=VALUE | --KEY VALUE]..."]


class TrainCommand(SettingsCommand):
    """Its help ends with every setting."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from horizon_lm.config_docs import settings_help

        super().format_help(ctx, formatter)
        formatter.write("\n" + settings_help(max(60, min(formatter.width, 110))))


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """What follows a verb -> (configuration file, overrides as `key=value`)."""
    config: str | None = None
    overrides: list[str] = []
    rest = iter(arguments)
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
                f"command line: '{argument}' is no option", "settings are key=value or --key value"
            )
        elif config is not None:
            hint = "settings are key=value; text with spaces needs quotes"
            raise ConfigError(f"command line: '{argument}' is neither key=value nor the only file", hint)
        else:
            config = argument
    return config, overrides


def _load(arguments: Sequence[str] | None) -> tuple[TrainConfig, list[str]]:
    from horizon_lm.config import load_config

    config, notes = load_config(*split_arguments(arguments or ()))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config, notes


@app.command(cls=TrainCommand, context_settings=_PASS_OPTIONS)
def train(
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, build, check and simulate a step; train nothing.")
    ] = False,
) -> None:
    """Train a model on text and leave it in Hugging Face format.

    Settings come from CONFIG.yaml, if given, and from key=value, --key value or --key=value, which win.
    """
    config, notes = _load(settings)
    if dry_run:
        from horizon_lm.run.planning import dry_run as run_dry

        return print(run_dry(config))
    from horizon_lm.run.train import train as run_training

    run_training(config, config_notes=notes)


class PlanCommand(SettingsCommand):
    """Its settings are followed by a machine."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml]", "[KEY=VALUE]...", "[hardware=NAME]", "[--json]"]


@app.command(cls=PlanCommand, context_settings=_PASS_OPTIONS)
def plan(
    settings: Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run will take and how fast it will be, before it is started; nothing is allocated.

    hardware=NAME plans for a machine that is not here: a shipped profile, or a file with one.
    """
    given = list(settings or ())
    hardware = [
        a.removeprefix("--").partition("=")[2] for a in given if a.removeprefix("--").startswith("hardware=")
    ]
    config, _ = _load([a for a in given if not a.removeprefix("--").startswith("hardware=")])
    from horizon_lm.plan.run_plan import plan_run
    from horizon_lm.plan.show import describe

    found = plan_run(config, hardware[-1] if hardware else "auto")
    if json:
        import json as writer

        print(writer.dumps(found.to_dict() | {"largest": found.largest()}, indent=2))
    else:
        print(describe(found))


@app.command()
def doctor(
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, although this machine was.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Look at this machine: what it has, how fast it is, what limits a run and how to mend it."""
    from horizon_lm.plan.doctor import examine

    found = examine(fresh=fresh)
    print(found.to_json() if json else found.to_text())
    if found.has_failed:
        raise typer.Exit(3)


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write RUN/report.html, a page with everything in it, and RUN/trace.json for ui.perfetto.dev."""
    from horizon_lm.run.report import write_report

    for path in write_report(Path(run)):
        print(f"written: {path}")


@config_app.command("show", cls=SettingsCommand, context_settings=_PASS_OPTIONS)
def config_show(settings: Settings = None) -> None:
    """Print every setting, defaults and overrides included, as YAML."""
    print(_load(settings)[0].to_yaml(), end="")


@config_app.command("validate", cls=SettingsCommand, context_settings=_PASS_OPTIONS)
def config_validate(settings: Settings = None) -> None:
    """Check a configuration; exit code 2 if it has a fault."""
    _load(settings)
    print("the configuration is valid")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    from horizon_lm.config import json_schema

    print(json_schema())


@config_app.command("docs")
def config_docs() -> None:
    """Print the reference of all settings, as Markdown."""
    from horizon_lm.config_docs import markdown

    print(markdown(), end="")


@app.command()
def env() -> None:
    """Print the versions that a bug report needs."""
    import platform

    lines = [
        ("horizon-lm", _version()),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
    ]
    lines += [
        (
            "cpu cores",
            str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        )
    ]
    driver = Path("/proc/driver/nvidia/version")
    lines += [("nvidia driver", driver.read_text().splitlines()[0] if driver.exists() else "none")]
    lines += [(name, _installed(name) or "not installed") for name in _ENV_PACKAGES]
    for name, version in lines:
        print(f"{name + ':':18}{version}")


@app.command()
def version() -> None:
    """Print the version of horizon-lm."""
    print(_version())


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


def _version() -> str:
    import horizon_lm

    return getattr(horizon_lm, "__version__", None) or _installed("horizon-lm") or "unknown"


def _report(message: str, hint: str | None) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `errors`; 130 after Ctrl-C; 1 for a mistake of ours)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result = app(args=arguments, prog_name="horizon", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except HorizonError as error:
        if debug:
            traceback.print_exc()
        _report(error.message, error.hint)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", None)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, _usage_errors()):
            return _report_usage(error)
        traceback.print_exc()
        _report(
            f"this is a bug in horizon: {type(error).__name__}: {error}",
            "please report it with 'horizon env'",
        )
        return 1


def _usage_errors() -> type[Exception]:
    """The base of typer's usage errors, which typer exports only through its subclass."""
    base: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    return base


def _report_usage(error: Any) -> int:
    text = str(error.format_message())
    if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
        print(text, file=sys.stderr)
        return 2
    text, found, nearest = text.partition(". Did you mean ")
    hint = f"did you mean {nearest}" if found else "'horizon --help' lists the commands"
    _report(text[:1].lower() + text[1:].rstrip("."), hint)
    return 2


if __name__ == "__main__":
    sys.exit(main())
