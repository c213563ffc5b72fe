"""The verbs `plan`, `doctor`, `report` and `draw`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from horizon_lm.cli.run import (
    SettingsArguments,
    SettingsCommand,
    load_settings,
    one_of,
    require_named_model,
    split_arguments,
)
from horizon_lm.errors import ConfigError
from horizon_lm.io.output import lasting_output

if TYPE_CHECKING:
    from horizon_lm.config import TrainConfig
    from horizon_lm.plan.fleet import Fleet
    from horizon_lm.plan.run_plan import RunPlan

T = TypeVar("T")


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
    named, rest = _named(settings or (), {"hardware": "auto", "nodes": "", "gpus_per_node": ""})
    hardware = named["hardware"]
    config, _ = load_settings(rest)
    require_named_model(config)
    from horizon_lm.plan.run_plan import fleet_of
    from horizon_lm.plan.show import describe

    def text(found: RunPlan) -> str:
        if not json:
            return describe(found)
        import json as writer

        sizes = {"largest": found.largest()}
        if found.of_fleet is not None:
            sizes |= found.of_fleet.sizes()
        return writer.dumps(found.to_dict() | sizes, indent=2)

    print(_of_plan(text, config, hardware, fleet_of(named["nodes"], named["gpus_per_node"], hardware)))


def _named(arguments: Sequence[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Split arguments NAME=VALUE, which are not settings, from the others."""
    found, rest = dict(defaults), []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in found and value:
            found[name] = value
        else:
            rest.append(argument)
    return found, rest


def _of_plan(
    use: Callable[[RunPlan], T], config: TrainConfig, hardware: str, fleet: Fleet | None = None
) -> T:
    """Plan a run and return what `use` makes of the plan."""
    from horizon_lm.machine.heap import frozen_heap, rare_collections
    from horizon_lm.plan.fleet import ONE
    from horizon_lm.plan.outline_cache import outline_cache
    from horizon_lm.plan.run_plan import plan_run, with_method_of_data

    with frozen_heap(), rare_collections(), outline_cache(config) as cache:
        config, notes = with_method_of_data(config)
        found = plan_run(config, hardware, cache=cache, fleet=fleet or ONE)
        found.notes.extend(notes)
        return use(found)


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


class DrawCommand(SettingsCommand):
    """`draw`, which takes a run, or settings and a machine."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[RUN | CONFIG.yaml]", "[KEY=VALUE]...", "[hardware=NAME]", "[OPTIONS]"]


def draw(
    settings: SettingsArguments = None,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Draw where a planned run's bytes are, in host and device memory."),
    ] = False,
    rows: Annotated[
        str, typer.Option(help="lanes, units, or auto: units if ops run one at a time, as on the CPU.")
    ] = "auto",
    theme: Annotated[str, typer.Option(help="light, dark, or auto: the reader's.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write; RUN/step.svg, step.svg or memory.svg by default."
        ),
    ] = None,
) -> None:
    """Draw a training step as SVG, recorded or simulated.

    Recorded by RUN, or planned for CONFIG.yaml and simulated. hardware=NAME plans for another machine, as for
    horizon plan.
    """
    one_of("--rows", rows, ("auto", "lanes", "units"))
    one_of("--theme", theme, ("auto", "light", "dark"))
    named, rest = _named(settings or (), {"hardware": "auto"})
    place, overrides = split_arguments(rest)
    if place is None and not overrides:
        raise ConfigError("command line: 'draw' needs a run or settings", "write horizon draw RUN")
    if place is not None and os.path.isdir(place):
        if overrides or memory or named["hardware"] != "auto":
            raise ConfigError(
                f"{place} is a folder: --memory and settings are for plans",
                hint=f"draw the plan: horizon draw {os.path.join(place, 'config.resolved.yaml')} ...",
            )
        from horizon_lm.report.drawings import draw_run, write_drawing

        drawing, target = draw_run(Path(place), theme=theme, rows=rows), Path(place) / "step.svg"
    else:
        config, _ = load_settings(rest)
        require_named_model(config)
        from horizon_lm.report.drawings import draw_planned_memory, draw_planned_step, write_drawing

        def drawn(plan: RunPlan) -> str:
            if memory:
                return draw_planned_memory(plan, theme=theme)
            return draw_planned_step(plan, theme=theme, rows=rows)

        drawing, target = (
            _of_plan(drawn, config, named["hardware"]),
            Path("memory.svg" if memory else "step.svg"),
        )
    with lasting_output():
        write_drawing(out or target, drawing)
        print(f"written: {out or target}")
