"""The command `horizon`: its verbs, exit codes and error output.

Verbs import torch, transformers and pydantic when they need them, so help answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from horizon_lm import plan as plan_package
from horizon_lm.cli import ranks
from horizon_lm.cli.bench import bench
from horizon_lm.cli.data import data_app, init
from horizon_lm.cli.model import EvalCommand, chat, evaluate, generate
from horizon_lm.cli.plan import DoctorCommand, DrawCommand, PlanCommand, doctor, draw, plan, report
from horizon_lm.cli.run import (
    HELP,
    PASS_OPTIONS,
    ResumeCommand,
    SettingsArguments,
    SettingsCommand,
    TrainCommand,
    export,
    load_settings,
    resume,
    train,
    verify,
)
from horizon_lm.errors import HorizonError, OutputLostError, StoppedError
from horizon_lm.io.output import command_output, lasting_output, silent_output
from horizon_lm.machine.cores import spin_briefly
from horizon_lm.version import VERSION

_ENV_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "datasets", "trl", "peft"),
    *("accelerate", "bitsandbytes", "numpy", "pydantic", "PyYAML", "typer", "rich", "matplotlib"),
)

# Errors of a path from the user, wherever it is first used.
_FAULTS_OF_PLACES = frozenset(
    {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS}
)

app = typer.Typer(
    name="horizon",
    help="Train large language models on one GPU, with the weights in host memory.",
    epilog="Begin with 'horizon train quickstart', or with 'horizon init' for your own model and data. "
    "--debug, anywhere, shows a traceback with every error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)
config_app = typer.Typer(
    help="Show, check and document settings.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(VERSION)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version of horizon-lm."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


# In the order in which a newcomer needs them.
app.command("init", context_settings=PASS_OPTIONS)(init)
app.command("train", cls=TrainCommand, context_settings=PASS_OPTIONS)(train)
app.command("resume", cls=ResumeCommand, context_settings=PASS_OPTIONS)(resume)
app.command("chat")(chat)
app.command("generate")(generate)
app.command("eval", cls=EvalCommand, context_settings=PASS_OPTIONS)(evaluate)
app.command("export")(export)
app.command("verify")(verify)
app.command("report")(report)
app.command("draw", cls=DrawCommand, context_settings=PASS_OPTIONS)(draw)
app.command("plan", cls=PlanCommand, context_settings=PASS_OPTIONS)(plan)
app.command("doctor", cls=DoctorCommand)(doctor)
app.command("bench")(bench)


@config_app.command("show", cls=SettingsCommand, context_settings=PASS_OPTIONS)
def config_show(settings: SettingsArguments = None) -> None:
    """Print all settings, defaults and overrides included, as YAML."""
    print(load_settings(settings)[0].to_yaml(), end="")


@config_app.command("validate", cls=SettingsCommand, context_settings=PASS_OPTIONS)
def config_validate(settings: SettingsArguments = None) -> None:
    """Check a configuration; exit code 2 if it is invalid."""
    load_settings(settings)
    with lasting_output():  # the answer is the exit code
        print("the configuration is valid")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    from horizon_lm.config import json_schema

    print(json_schema())


@config_app.command("docs")
def config_docs() -> None:
    """Print the reference of all settings, as Markdown."""
    from horizon_lm.config.reference import markdown

    print(markdown(), end="")


@app.command()
def env() -> None:
    """Print the versions that a bug report needs."""
    import platform
    from importlib.machinery import EXTENSION_SUFFIXES

    from horizon_lm.machine.cores import usable_cores

    package = Path(__file__).parent.parent
    is_built = any((package / f"_optimizer{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    lines = [
        ("horizon-lm", VERSION),
        ("update kernel", "built" if is_built else "not built"),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
    ]
    lines += [("cpu cores", str(usable_cores()))]
    driver = Path("/proc/driver/nvidia/version")
    lines += [("nvidia driver", driver.read_text().splitlines()[0] if driver.exists() else "none")]
    lines += [(name, _installed(name) or "not installed") for name in _ENV_PACKAGES]
    for name, version in lines:
        print(f"{name + ':':18}{version}")


@app.command()
def version() -> None:
    """Print the version of horizon-lm."""
    print(VERSION)


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


def _report(message: str, hint: str | None, rank: int = 0) -> None:
    who = f"rank {rank}: " if rank else ""
    for title, text in (("error", message), ("hint", hint)):
        if text:  # may quote names with lines that look like another title
            print(f"{who}{title}: " + re.sub(r"\n(?! )", "\n  ", text), file=sys.stderr)


def main(argv: Sequence[str] | None = None, *, prog_name: str = "horizon") -> int:
    """Run one command; return the exit code (see `errors`; 130 after Ctrl-C; 1 for a bug of ours).

    prog_name: the command's name in help texts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # this process is the command's own
        plan_package.models_are_stock = True
        spin_briefly()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with command_output():
        try:
            code = _run(arguments, prog_name, debug=debug)
            sys.stdout.flush()
            return code
        except OutputLostError as lost:
            if not lost.is_silent:
                _report(lost.message, lost.hint)
            return lost.exit_code


def _run(arguments: list[str], prog_name: str, *, debug: bool) -> int:
    here = ranks.Place()
    try:
        here = ranks.place()
        if not ranks.has_work(arguments, here):
            return 0
        with silent_output(here.rank > 0):
            result = app(args=arguments, prog_name=prog_name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except OutputLostError:
        raise
    except StoppedError as stop:
        with lasting_output(after_pipe=True):  # a run's last message
            if ranks.speaks(stop, here):
                print(f"{stop.message}; to go on: {stop.hint}", file=sys.stderr)
        return stop.exit_code
    except HorizonError as error:
        if debug:
            traceback.print_exc()
        if ranks.speaks(error, here):
            _report(error.message, error.hint, here.rank)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", None, here.rank)
        return 130
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return _report_exception(end.__context__, here.rank, debug=debug)  # typer exits for any broken pipe
    except Exception as error:
        return _report_exception(error, here.rank, debug=debug)


def _report_exception(error: Exception, rank: int, *, debug: bool) -> int:
    """Report an exception that no code of ours explains."""
    if isinstance(error, OSError) and error.errno in _FAULTS_OF_PLACES and error.filename and not debug:
        _report(f"{os.fsdecode(error.filename):.200}: {error.strerror}", "give another path", rank)
        return 2
    if isinstance(error, _usage_errors()):
        return _report_usage(error)
    traceback.print_exception(error)
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    _report(
        f"this is a bug in horizon: {type(error).__name__}: {error}{where}",
        "please report it with 'horizon env'",
        rank,
    )
    return 1


def _usage_errors() -> type[Exception]:
    """Return the base of typer's usage errors, which typer exports only through its subclass."""
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
