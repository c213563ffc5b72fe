"""`make bench`: everything that this machine can run, in one dated file, with a table at the end.

Parts: micro (rates of the machine), cpu (plain transformers and the Trainer), preferences (and TRL's
trainers), adapters (LoRA, and PEFT), gpu (if there is one; it has its own file), simulated (scaling on paper:
other machines).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from . import adapters, cpu, gpu, micro, placement, preferences, simulated
from .report import Report

SIMULATED = """**Nothing in this table was measured.** It is the schedule that the engine runs, simulated with
the rates of the hardware profile named in each row (`plan/profiles`; each rate has its source there). The
profiles of machines that are not here rest on data sheets and on measurements of others, not on a calibration
run of ours; the simulator itself was compared with measured steps in benchmarks/results/*planner-cpu*.md."""


def _micro(report: Report, small: bool) -> list[list[str]]:
    rows = micro.fill(report, micro.options(["--dry-run"] if small else []))
    return [["this machine: " + name, value] for name, value in rows]


def _cpu(report: Report, small: bool) -> list[list[str]]:
    report.section("Beside plain transformers and the Trainer, on the CPU", cpu.__doc__ or "")
    arguments = cpu.options(["--sizes", "tiny", "--length", "32", "--threads", "1"] if small else [])
    arguments.inline = small
    if small:
        arguments.work = arguments.work / "dry-run"
        arguments.fresh = True
    return [["CPU: " + name, value] for name, value in cpu.summary(cpu.fill(report, arguments))]


def _preferences(report: Report, small: bool) -> list[list[str]]:
    report.section("Preferences, and TRL's trainers, on the CPU", preferences.__doc__ or "")
    few = ["--sizes", "tiny", "--dtypes", "float32", "--length", "32", "--threads", "1"]
    arguments = preferences.options(few if small else [])
    arguments.inline = small
    return [
        ["CPU: " + name, value] for name, value in preferences.summary(preferences.fill(report, arguments))
    ]


def _adapters(report: Report, small: bool) -> list[list[str]]:
    report.section("Adapters, on the CPU", adapters.__doc__ or "")
    arguments = adapters.options(["--sizes", "tiny", "--length", "32", "--threads", "1"] if small else [])
    return [["CPU: " + name, value] for name, value in adapters.summary(adapters.fill(report, arguments))]


def _gpu(report: Report, small: bool) -> list[list[str]]:
    report.section("GPU")
    if torch.cuda.is_available() and not small:
        gpu.main([])
        report.parts.append("See the results file `gpu` of the same date.")
        return [["GPU suite", "see its own file"]]
    report.parts.append(gpu.ABSENT + ".")
    return [["GPU suite", gpu.ABSENT]]


def _simulated(report: Report, small: bool) -> list[list[str]]:
    report.section("Scaling on paper", SIMULATED)
    simulated.fill(report, most=1 if small else None)
    report.section("Residents and rounds", placement.__doc__ or "")
    placement.fill(report, most=1 if small else None)
    return [["scaling on paper", "SIMULATED, see the table"]]


PARTS: dict[str, Callable[[Report, bool], list[list[str]]]] = {
    "micro": _micro,
    "cpu": _cpu,
    "preferences": _preferences,
    "adapters": _adapters,
    "gpu": _gpu,
    "simulated": _simulated,
}


def fill(report: Report, parts: list[str], *, small: bool = False) -> list[list[str]]:
    """Run the parts; return the rows of the table at the end. A failing part does not end the others."""
    rows: list[list[str]] = []
    for part in parts:
        print(f"== {part}", flush=True)
        start = time.monotonic()
        try:
            rows += PARTS[part](report, small)
        except Exception as error:
            import traceback

            traceback.print_exc()
            report.parts.append(f"This part failed: {type(error).__name__}: {error}")
            rows.append([part, f"FAILED: {type(error).__name__}"])
        print(f"== {part}: {time.monotonic() - start:.0f} s", flush=True)
    report.section("At the end")
    report.table(["what", "found"], rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description="Everything that this machine can run.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks suite", *argv])
    report = Report("suite", __doc__ or "", command=command)
    rows = fill(report, arguments.parts)
    report.write()
    width = max((len(row[0]) for row in rows), default=0)
    print("\n".join(f"{row[0]:<{width}}  {row[1]}" for row in rows))
    return 1 if any(row[1].startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
