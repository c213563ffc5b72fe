"""The GPU suite: Horizon-LM, in-memory torch, and other systems that use host memory.

The first stages are the evidence (`make gpu-evidence`): rates of the machine, the planner's profile,
gradients and lanes, and the main comparisons, estimated at half an hour. The others take hours
(`make bench-gpu`).

All share transformers configuration, weights, random tokens without padding, bf16 compute, sdpa attention
and AdamW. Peers checkpoint the activations of every layer; ours follows the planner. Each job runs in
its own process. `speed / in-memory` is tokens/s over those of the in-memory run of the same group. MFU
counts 6 N + causal attention, without the embedding table and without recomputation; HFU counts
recomputation too.

A system that is absent or runs out of memory gets a row that says so; one that fits at a smaller size names
the size. Peers marked `not exact` keep no fp32 masters or moments, or postpone updates: they do not train the
same way.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from horizon_lm import words
from horizon_lm.bench.figures import Row, peak_of

from .gpu_evidence import EVIDENCE
from .gpu_goals import add_goals
from .gpu_parts import PARTS, Stage
from .gpu_runner import Call, build_kernel, run_stages, said, waiting
from .gpu_tables import MACHINE, add_stages
from .jobs import Ledger
from .report import Report, commit

WORK = Path(__file__).parent.parent / "build" / "gpu-evidence"
SECONDS = 530.0  # of a call with --evidence; a command may take ten minutes
ABSENT = "the GPU part has not run: torch sees no CUDA device"
STAGES: dict[str, Stage] = EVIDENCE | PARTS
_KEPT = ("*.jsonl", "*.md", "hardware.yaml", "trace.json.gz", "timeline.json")  # copied to $OUT


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks gpu", description="The GPU suite.")
    add = parser.add_argument
    add("--evidence", action="store_true", help="run only the stages of the evidence")
    add("--stage", nargs="+", choices=list(STAGES), help="run only these stages; all by default")
    add("--list", action="store_true", help="print stages and jobs with estimated times and state")
    add("--dry-run", action="store_true", help="check: run at a tiny size on the CPU, in this process")
    add("--seconds", type=float, help="time limit of this call; 530 with --evidence, else none")
    add("--again", action="store_true", help="repeat jobs that failed, were killed or ran out of memory")
    add("--any-commit", action="store_true", help="accept results of other commits and machines")
    add("--report", action="store_true", help="write the results file from the ledger; run nothing")
    add("--out", type=Path, default=WORK, help="results folder; pass it again to resume")
    arguments = parser.parse_args(argv)
    if arguments.seconds is None and arguments.evidence:
        arguments.seconds = SECONDS
    names = arguments.stage or (EVIDENCE if arguments.evidence else STAGES)
    arguments.stages = {name: STAGES[name] for name in names}
    arguments.name = "gpu-evidence" if arguments.evidence else "gpu"
    arguments.folder = arguments.out / "dry-run" if arguments.dry_run else arguments.out
    return arguments


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    arguments.command = " ".join(["python -m benchmarks gpu", *argv])
    arguments.deadline = began + (arguments.seconds or float("inf"))
    if arguments.list:
        print("\n".join(listed(arguments.stages, ledger_of(arguments))))
        return 0
    if arguments.report:
        write(arguments, ledger_of(arguments))
        return 0
    if arguments.dry_run:
        return run(arguments)
    if not torch.cuda.is_available():
        print(ABSENT)
        found = Report(arguments.name, __doc__ or "", command=arguments.command)
        found.section("Result", f"{ABSENT}. `make gpu-evidence` on a machine with one runs it.")
        found.write(None if arguments.out == WORK else arguments.out)
        return 0
    is_built, said = build_kernel()
    if not is_built:
        print("\n".join(said))
        print("the C++ optimizer could not be built; measuring the torch reference would mislead")
        print("  hint: install a C++ compiler and setuptools, then run the same command again")
        return 1
    return run(arguments)


def ledger_of(arguments: argparse.Namespace) -> Ledger:
    """Open the folder's rows of this commit and machine; to list or report without a GPU, all rows."""
    here = torch.cuda.is_available() and not arguments.dry_run
    device = torch.cuda.get_device_name() if here else "CPU"
    reads = not here and not arguments.dry_run
    path = arguments.folder / "rows.jsonl"
    return Ledger(path, f"{commit()}, {device}", any_stamp=arguments.any_commit or reads)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages in order; write the results after each."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.dry_run:  # the folder also carries caches, the profile among them
        os.environ["XDG_CACHE_HOME"] = str((folder / "cache").resolve())
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    ledger = ledger_of(arguments)
    ledger.add(MACHINE, about_machine(arguments.dry_run))
    call = Call(folder, arguments.deadline, arguments.dry_run, arguments.again)
    try:
        run_stages(arguments.stages, ledger, call, lambda: write(arguments, ledger))
    except KeyboardInterrupt:
        write(arguments, ledger)
        print("stopped; run the same command to continue", file=sys.stderr)
        return 130
    write(arguments, ledger, simulate=not waiting(arguments.stages, ledger))
    left = waiting(arguments.stages, ledger)
    for name, count in left.items():
        print(f"{name}: {words.count(count, 'job')} left")
    print("run the same command to continue" if left else "everything has run")
    return 0


def about_machine(dry_run: bool) -> Row:
    """Return the row that the tables need about the machine: description and peak FLOP/s."""
    cuda = torch.cuda.is_available() and not dry_run
    peak, source = peak_of(torch.device("cuda"), torch.bfloat16) if cuda else (1e12, "none: a dry run")
    return {"status": "done", "dry": dry_run, "text": Report.machine(), "peak": peak, "peak_source": source}


def write(arguments: argparse.Namespace, ledger: Ledger, *, simulate: bool = False) -> None:
    """Write the results file to the folder and to benchmarks/results; copy `_KEPT` to $OUT.

    simulate: also simulate remedies, which takes a while.
    """
    about = ledger.rows.get(MACHINE)
    found = Report(
        arguments.name, __doc__ or "", command=arguments.command, machine=about["text"] if about else None
    )
    add_stages(found, arguments.stages, ledger)
    rows = [row for row in ledger.rows.values() if "case" in row]
    add_goals(found, rows, float(about["peak"]) if about else 1.0, simulate=simulate)
    found.write(arguments.folder)
    if arguments.dry_run:
        return
    found.write()
    outside = os.environ.get("OUT")
    if outside and Path(outside).resolve() != arguments.folder.resolve():
        for path in (path for pattern in _KEPT for path in arguments.folder.glob(pattern)):
            shutil.copy2(path, outside)


def listed(stages: Mapping[str, Stage], ledger: Ledger) -> list[str]:
    """Return lines: stages with estimated seconds; jobs with estimate, limit and state."""
    lines, total = [], 0.0
    for name, jobs in stages.items():
        found = list(jobs())
        seconds = sum(job.seconds for job in found)
        total += seconds
        lines.append(f"{name}: {words.count(len(found), 'job')}, estimated {seconds:,.0f} s")
        for job in found:
            row = ledger.rows.get(job.key)
            state = f"{said(row)} ({row.get('took', 0):.0f} s)" if row else "not run"
            lines.append(f"  {job.seconds:>4.0f} s, at most {job.limit:.0f} s  {job.key}: {state}")
    return [*lines, f"estimated total: {total / 60:.0f} minutes; no time here was measured"]


if __name__ == "__main__":
    sys.exit(main())
