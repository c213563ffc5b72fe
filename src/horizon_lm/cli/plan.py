"""The verbs `plan`, `doctor` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from horizon_lm.cli.run import (
    SettingsArguments,
    SettingsCommand,
    load_settings,
    require_named_model,
    split_arguments,
)
from horizon_lm.io.output import lasting_output

if TYPE_CHECKING:
    from horizon_lm.config import TrainConfig


class PlanCommand(SettingsCommand):
    """`plan`, which takes settings and a machine."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        fleet = ["[nodes=N]", "[gpus_per_node=N]"]
        return ["[CONFIG.yaml]", "[KEY=VALUE]...", "[hardware=NAME]", *fleet, "[--json]"]


class DoctorCommand(SettingsCommand):
    """`doctor`, which takes a model or the settings of a run."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml | MODEL]", "[KEY=VALUE]..."]


def plan(
    settings: SettingsArguments = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and speed of a run; allocate nothing.

    hardware=NAME plans for another machine: a shipped profile, or a file with one. nodes=N gpus_per_node=N
    plans for several of them, with one rank per GPU.
    """
    named, rest = {"hardware": "auto", "nodes": "", "gpus_per_node": ""}, []
    for argument in settings or ():
        name, _, value = argument.removeprefix("--").partition("=")
        if name in named and value:
            named[name] = value
        else:
            rest.append(argument)
    hardware = named["hardware"]
    config, _ = load_settings(rest)
    require_named_model(config)
    from horizon_lm.machine.heap import frozen_heap
    from horizon_lm.plan.outline_cache import outline_cache
    from horizon_lm.plan.run_plan import fleet_of, plan_run, with_method_of_data
    from horizon_lm.plan.show import describe

    fleet = fleet_of(named["nodes"], named["gpus_per_node"], hardware)
    with frozen_heap(), outline_cache(config) as cache:
        config, notes = with_method_of_data(config)
        found = plan_run(config, hardware, cache=cache, fleet=fleet)
        found.notes.extend(notes)
        if json:
            import json as writer

            sizes = {"largest": found.largest()}
            if found.of_fleet is not None:
                sizes |= found.of_fleet.sizes()
            text = writer.dumps(found.to_dict() | sizes, indent=2)
        else:
            text = describe(found)
    print(text)


def doctor(
    settings: SettingsArguments = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even if this machine was.")] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Measure again, with more repetitions; takes minutes.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit for measuring: 30 by default, 100 on a GPU.", min=0)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the profile to this file; hardware=FILE reads it on any machine."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Measure this machine and say what to fix.

    Its hardware, its speed, and what limits a run.

    With the settings of a run, or a model, it also says how the model's experts run here.
    Measuring is limited to 30 seconds, or 100 on a GPU. --thorough runs each model five times instead of
    twice, and measures the memory of three processes of each kind instead of one.
    """
    from horizon_lm.plan.doctor import Interrupted, examine, to_lines

    config = _examined(settings)
    try:
        found = examine(
            fresh=fresh, thorough=thorough, seconds=seconds, out=out, config=config, say=_say_measured
        )
    except Interrupted as stop:
        print(file=sys.stderr)
        if json:
            import json as writer

            print(writer.dumps({"findings": [vars(f) for f in stop.findings], "interrupted": True}, indent=2))
        else:
            print("\n".join(to_lines(stop.findings)))
        print("nothing was saved: measuring was interrupted", file=sys.stderr)
        raise
    print(found.to_json() if json else found.to_text())
    if found.has_failed:
        raise typer.Exit(3)


def _examined(arguments: list[str] | None) -> TrainConfig | None:
    """Return the settings that arguments of `doctor` name; a model alone gets data that nobody reads."""
    if not arguments:
        return None
    place, rest = split_arguments(arguments)
    if place is not None and not place.endswith((".yaml", ".yml")):
        arguments = [f"model_name_or_path={place}", "datasets=none.txt", *rest]
    config, _ = load_settings(arguments)
    require_named_model(config)
    return config


def _say_measured(what: str, figure: str | None) -> None:
    """Print a measurement's name when it starts and its result when it ends, on one line."""
    if figure is None:
        print(f"measuring  {what} ... ", end="", file=sys.stderr, flush=True)
    else:
        print(figure, file=sys.stderr, flush=True)


def report(run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write the report of a run, an HTML page, and its trace.

    RUN/report.html is self-contained; RUN/trace.json is for ui.perfetto.dev. Works for running, stopped and
    killed runs too.
    """
    from horizon_lm.report.html import write_report

    with lasting_output():
        report = write_report(Path(run))
        print(report.text)
        for path in report.written:
            print(f"written: {path}")
