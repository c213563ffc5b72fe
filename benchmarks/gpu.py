"""The GPU suite: Horizon-LM, in-memory torch, and other systems that use host memory.

All share transformers configuration, weights, random tokens without padding, bf16 compute, sdpa attention
and AdamW. Peers checkpoint the activations of every layer; ours follows the planner. Each system runs in
its own process. `speed / in-memory` is tokens/s over those of the in-memory run of the same group. MFU
counts 6 N + causal attention, without the embedding table and without recomputation; HFU counts
recomputation too.

A system that is absent or runs out of memory is a row that says so. Peers marked `not exact` keep no fp32
masters or moments, or postpone updates: they do not train the same way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from horizon_lm.bench.figures import HEAD, Row, cells, lane_lines, peak_of
from horizon_lm.bench.jobs import Worker
from horizon_lm.bench.ours import train_config
from horizon_lm.machine.profile import cache_path
from horizon_lm.plan.run_plan import plan_run

from .gpu_goals import add_goals
from .gpu_parts import PARTS, Job, rehearsed
from .jobs import InlineWorker, Ledger, measure_fitting
from .peers import PEERS
from .report import Report, commit

WORK = Path(__file__).parent.parent / "build" / "bench"
SECONDS = 520.0  # per part; a command may take ten minutes
ABSENT = "the GPU part has not run: torch sees no CUDA device"


def with_largest_model(job: Job) -> Job:
    """Return the job with as many layers as the planner says will fit."""
    config = train_config(job.case).replace(skip_memory_check=True)  # the original may be too large
    model = job.case.model | {"num_hidden_layers": max(1, plan_run(config).most_layers())}
    return Job(job.name, job.system, job.case.replace(model=model), job.group)


def run_job(job: Job, seconds: float, rehearse: bool) -> Row:
    """Run one row. Retry the largest model with 5 % fewer layers, up to three times, if the planner
    promised too much."""
    kind = InlineWorker if rehearse else Worker
    if not job.largest:
        return measure_fitting(job.system, job.case, seconds=seconds, kind=kind)
    deadline = time.monotonic() + seconds
    if not rehearse:
        job = with_largest_model(job)
    for _ in range(4):
        left = max(1.0, deadline - time.monotonic())
        row = measure_fitting(job.system, job.case, seconds=left, kind=kind)
        if row.get("status") != "out of memory":
            break
        layers = int(job.case.model["num_hidden_layers"])
        model = job.case.model | {"num_hidden_layers": max(1, int(0.95 * layers))}
        job = Job(job.name, job.system, job.case.replace(model=model), job.group)
    return row


def run_part(part: str, ledger: Ledger, *, rehearse: bool, seconds: float = SECONDS) -> int:
    """Run the unfinished jobs of a part while time remains; return how many are left."""
    deadline, left = time.monotonic() + seconds, 0
    for job in PARTS[part]():
        name = f"{part}: {job.group}: {job.name}"
        if ledger.get(name) is not None:
            continue
        if time.monotonic() >= deadline:
            left += 1
            continue
        found = rehearsed(job) if rehearse else job
        same = next((r for r in ledger.rows.values() if r["key"] == found.case.key(found.system)), None)
        if rehearse and same is not None:  # shrinks to a job that was rehearsed
            row = same
        else:
            row = run_job(found, max(1.0, deadline - time.monotonic()), rehearse)
        labels = {"part": part, "group": job.group, "name": job.name, "reference": job.reference}
        ledger.add(name, row | labels)
        left += row.get("status") == "no time"
        rate = row.get("tokens_per_second", [0])[0]
        said = f"{rate:,.0f} tokens/s" if rate else row.get("why", "")
        print(f"{name}: {row.get('status')} {said}", flush=True)
    return left


def tables(report: Report, ledger: Ledger, device: torch.device) -> None:
    """Add a section for each part that has rows, with the lanes of ours."""
    peak, source = peak_of(device, torch.bfloat16)
    report.parts.append(f"MFU and HFU against {peak / 1e12:.0f} TFLOP/s ({source}).")
    for part in PARTS:
        mine = [row for row in ledger.rows.values() if row["part"] == part]
        if not mine:
            continue
        report.section(part)
        for group in dict.fromkeys(row["group"] for row in mine):
            rows = [row for row in mine if row["group"] == group]
            reference = next((r for r in rows if r["reference"] and r.get("status") == "done"), None)
            best = reference["tokens_per_second"][0] if reference else None
            table = [cells(_title(row), row, peak=peak, in_memory=best) for row in rows]
            report.table(HEAD, table, note=_note(group, rows))


def _title(row: Row) -> str:
    peer = PEERS.get(row["name"].partition(",")[0])
    return row["name"] + (" (not exact)" if peer is not None and not peer.exact else "")


def _note(group: str, rows: list[Row]) -> str:
    lines = [f"{group}; {rows[0]['parameters'] / 1e9:.2f} B parameters."]
    for row in rows:
        layers = row["case"]["model"]["num_hidden_layers"]
        if row["part"] == "largest":
            lines.append(f"{row['name']}: {layers} layers, {row['parameters'] / 1e9:.2f} B parameters.")
        peer = PEERS.get(row["name"].partition(",")[0])
        if peer is not None:
            lines.append(f"{row['name']}: {peer.note}.")
        if "breakdown" in row:
            lines += ["", "```", row["name"], *lane_lines(row["breakdown"]), "```"]
    return "\n".join(lines)


def measure_machine(rehearse: bool) -> None:
    """Measure the planner's profile with `horizon doctor`, once per machine."""
    if not rehearse and not cache_path().is_file():
        command = [sys.executable, "-m", "horizon_lm.cli", "doctor"]
        subprocess.run(command, check=False, timeout=SECONDS)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The GPU suite.")
    parser.add_argument("--part", nargs="+", choices=["machine", *PARTS], help="all by default")
    parser.add_argument("--list", action="store_true", help="name the parts and their jobs")
    parser.add_argument("--rehearse", action="store_true", help="run at a tiny size on the CPU, keep nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per part")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of rows and results; name it again to resume"
    )
    arguments = parser.parse_args(argv)
    arguments.work = arguments.out or WORK
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    if arguments.list:
        for part, jobs in PARTS.items():
            print(part, *(f"  {job.group}: {job.name}" for job in jobs()), sep="\n")
        return 0
    command = " ".join(["python -m benchmarks gpu", *argv])
    report = Report("gpu", __doc__ or "", command=command)
    if not arguments.rehearse and not torch.cuda.is_available():
        print(ABSENT)
        report.section("Result", ABSENT + ". `make bench-gpu` on a machine with one runs it.")
        report.write(arguments.out)
        return 0
    run_all(report, arguments)
    if not arguments.rehearse:
        report.write(arguments.out)
    return 0


def run_all(report: Report, arguments: argparse.Namespace) -> None:
    """Run all requested parts, then write the tables of all that this commit has measured here."""
    rehearse = arguments.rehearse
    device = torch.device("cpu" if rehearse else "cuda")
    name = "rehearsal" if rehearse else torch.cuda.get_device_name()
    ledger = Ledger(arguments.work / ("rehearsal.jsonl" if rehearse else "gpu.jsonl"), f"{commit()}, {name}")
    wanted = arguments.part or ["machine", *PARTS]
    measure_machine(rehearse)
    if "machine" in wanted:
        from . import micro

        micro.fill(report, micro.options(["--rehearse"] if rehearse else []))
        if not rehearse:
            torch.cuda.empty_cache()  # the workers need the device
    left = {
        part: run_part(part, ledger, rehearse=rehearse, seconds=arguments.seconds)
        for part in PARTS
        if part in wanted
    }
    tables(report, ledger, device)
    add_goals(report, list(ledger.rows.values()), device)
    for part, count in left.items():
        if count:
            print(f"{part}: {count} jobs left; the same command goes on with them")


if __name__ == "__main__":
    sys.exit(main())
