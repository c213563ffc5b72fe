"""Several ranks on the CPUs of this machine (Gloo, loopback): bytes, collectives, speed, memory.

All ranks share two cores and one loopback device: ratios tell what several ranks cost, not what a network
gives. Nothing here ran on a GPU, and NCCL has not run.

- bytes: what each rank sends in a step, counted; the sum over the step's collectives; the formula of
  docs/guides/many-gpus.md.
- speed: two ranks of one thread each, one rank of two threads, FSDP2 with CPU offload and DeepSpeed ZeRO-3
  (two ranks each). Steps of all alternate. Of our ranks: seconds of one more step in collectives, and of
  waiting, which is what a rank spends in them beyond the fastest rank.
- memory: the peak of each rank's process beside the planner's prediction for a rank.
- alone: one rank beside one of an earlier checkout (`--before FOLDER`); steps alternate.

Results are kept by sources and machine in build/bench; `--fresh` repeats them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from horizon_lm.bench.figures import Row, spread
from horizon_lm.bench.jobs import OURS, TORCH, measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case
from horizon_lm.plan.calibrate import process_memory

from . import rank_memory
from .jobs import Ledger
from .peers import PEERS
from .rank_group import RANKS, RankGroup, by_threads, checkouts
from .report import Report, cpu_name, sources

WORK = Path(__file__).parent.parent / "build" / "bench"
WANTED = 0.85  # of the speed of one rank, for two ranks on the same cores
NEAR = 0.03  # of the predicted memory
PEER_NAMES = ("fsdp2-offload", "zero3-offload")
EXACT, FAST = "ours, 2 ranks, exact", "ours, 2 ranks, fast"


def case_of(size: str, dtype: str, rows: int, **changes: Any) -> Case:
    """Return a step of 2,048 tokens: 4 sequences of 512, `rows` in a micro-batch."""
    case = Case(shape(size), length=512, sequences=4, rows=rows, dtype=dtype, warmup=2, lr=3e-4, threads=1)
    return case.replace(**changes)


def group_of(world: int) -> Any:
    """Return the kind of worker that runs a system on `world` ranks."""
    return partial(RankGroup, world=world)


# ---- bytes ----------------------------------------------------------------------------------


def formula(sizes: tuple[int, int, int], world: int, positions: int, fast: bool, size: int) -> float:
    """Return the bytes that a rank sends in a step, by the guide's formula.

    sizes: parameters of the model, of its layers, and of an untied embedding table, whose gradients are sent
    as rows. positions: micro-batches of a rank. size: bytes of a weight and of a micro-batch's gradient.
    """
    parameters, layers, table = sizes
    weights = size * (parameters + layers)  # layers once more, for their backward pass
    gradients = (parameters - table) * (4 if fast else size * positions)
    return (world - 1) / world * (weights + gradients)


def by_ops(row: Row, world: int, fast: bool, size: int) -> float:
    """Return the bytes of the collectives of the recorded step."""
    units, found = row["info"]["units"], row["breakdown"]
    rows = math.ceil(found["rows"] * row["info"]["width"] / world)
    gradient = 4 if fast else size
    total, has_rows = 0.0, False
    for name, _ in found["network"]:
        weights, trainable = units[int(name[1:].partition(".")[0])]
        parts = {"J": size * weights, "T": gradient * trainable, "V": gradient * rows}
        total += parts[name[0]]
        has_rows |= name[0] == "V"
    total += 4 * rows * has_rows  # the sums of rows go to all ranks
    return (world - 1) * total


def bytes_job(world: int, case: Case) -> Callable[[], Row]:
    return lambda: measure([(RANKS, case)], kind=group_of(world))[0] | {"world": world}


def bytes_cells(row: Row) -> list[str]:
    case, world = Case.from_json(row["case"]), row["world"]
    reduction = case.extra["reduction"]
    name = [str(world), case.dtype, reduction]
    if row["status"] != "done":
        return [*name, f"{row['status']}: {row.get('why')}", "", "", ""]
    fast, size = reduction == "fast", case.torch_dtype.itemsize
    layers = int(case.model["num_hidden_layers"])
    numels = [trainable * world for _, trainable in row["info"]["units"]]
    positions = -(-case.sequences // world)
    sizes = row["parameters"], sum(numels[1 : layers + 1]), sum(numels[layers + 2 :])
    wanted = formula(sizes, world, positions, fast, size)
    sent = [answer["breakdown"]["sent"] for answer in row["ranks"]]
    counted = by_ops(row, world, fast, size)
    shown = [f"{value / 1e6:.2f}" for value in (max(sent), counted, wanted)]
    return [*name, *shown, f"{max(sent) / wanted:.3f}"]


# ---- speed ----------------------------------------------------------------------------------


def speed_job(case: Case, peers: list[str]) -> Callable[[], Row]:
    one = case.replace(threads=2)
    systems = {
        "ours, 1 rank": (OURS, one),
        EXACT: (RANKS, case.replace(extra={"reduction": "exact"})),
        FAST: (RANKS, case.replace(extra={"reduction": "fast"})),
        "plain torch, 1 process": (TORCH, one),
    }
    bf16_only = {"zero3-offload"} if case.dtype != "bfloat16" else set()
    systems |= {f"{name}, 2 ranks": (PEERS[name].target, case) for name in peers if name not in bf16_only}

    def run() -> Row:
        before = os.getloadavg()[0]
        rows = measure(list(systems.values()), kind=by_threads(2))  # type: ignore[arg-type]
        load = [before, os.getloadavg()[0]]
        return {"status": "done", "load": load, "systems": dict(zip(systems, rows, strict=True))}

    return run


def speed_cells(job: str, row: Row) -> list[list[str]]:
    found = row["systems"]
    base, rows = found["ours, 1 rank"], []
    for name, own in found.items():
        if own["status"] != "done" or base["status"] != "done":
            rows.append([job, name, f"{own['status']}: {own.get('why', '')}", "", "", "", "", ""])
            continue
        wall, cpu = (
            spread([a / b for a, b in zip(base[clock], own[clock], strict=True)])
            for clock in ("seconds", "cpu_seconds")
        )
        apart = max(abs(a - b) / abs(b) for a, b in zip(own["losses"], base["losses"], strict=True))
        cells = [f"{own['tokens_per_second'][0]:,.0f}", wall.text(3), f"{cpu.median:.3f}", f"{apart:.0e}"]
        goal = ["", ""]
        if name == EXACT:
            short = f"NO, {1 - wall.median / WANTED:.1%} short"
            goal = [str(WANTED), "yes" if wall.median >= WANTED else short]
        rows.append([job, name, *cells, *goal])
    return rows


def network_cells(job: str, row: Row) -> list[list[str]]:
    """Return, for each reduction, seconds of the recorded step in collectives, and waiting by rank."""
    rows = []
    for name in (EXACT, FAST):
        if row["systems"][name]["status"] != "done":
            continue
        found = [answer["breakdown"] for answer in row["systems"][name]["ranks"]]
        spans = [[seconds for _, seconds in own["network"]] for own in found]
        moving = sum(min(each) for each in zip(*spans, strict=True))
        waits = [sum(own) - moving for own in spans]
        step = max(own["seconds"] for own in found)
        lists = (waits, [own["exchanges"] for own in found])
        shown = [", ".join(f"{value:.3f}" for value in values) for values in lists]
        rows.append([job, name, f"{moving:.3f}", *shown, f"{step:.3f}", f"{moving / step:.1%}"])
    return rows


# ---- memory ---------------------------------------------------------------------------------


def memory_job(
    world: int, case: Case, runs: int, process: Callable[..., tuple[int, float]]
) -> Callable[[], Row]:
    """process: measures bytes of a process before it has a model, and the heap's share."""

    def run() -> Row:
        found = process("cpu", runs)
        return {
            "status": "done",
            "process": found,
            "measured": rank_memory.measured(case, world, runs),
            "predicted": rank_memory.predicted(case, world, *found),
        }

    return run


def memory_cells(job: str, row: Row) -> list[str]:
    predicted, measured = row["predicted"], row["measured"]
    errors = [predicted / each - 1 for each in measured]
    worst = max(errors, key=abs)
    shown = ", ".join(f"{each / 1e6:,.0f}" for each in measured)
    met = "yes" if abs(worst) <= NEAR else f"NO, {abs(worst):.1%}"
    return [job, shown, f"{predicted / 1e6:,.0f}", f"{worst:+.1%}", met]


# ---- one rank, before and after -------------------------------------------------------------


def alone_job(case: Case, before: Path) -> Callable[[], Row]:
    def run() -> Row:
        load = os.getloadavg()[0]
        now, then = measure([(OURS, case)] * 2, kind=checkouts([None, before]))  # type: ignore[arg-type]
        return {"status": "done", "load": [load, os.getloadavg()[0]], "now": now, "then": then}

    return run


def alone_cells(job: str, row: Row) -> list[str]:
    now, then = row["now"], row["then"]
    if {now["status"], then["status"]} != {"done"}:
        return [job, f"{now.get('why', '')} {then.get('why', '')}", "", "", "", ""]
    ratios = [
        spread([b / a for a, b in zip(now[clock], then[clock], strict=True)]).text(3)
        for clock in ("seconds", "cpu_seconds")
    ]
    same = "yes" if now["losses"] == then["losses"] else "NO"
    peaks = now["peaks"]["host"] / then["peaks"]["host"]
    return [job, f"{now['tokens_per_second'][0]:,.0f}", *ratios, same, f"{peaks:.3f}"]


# ---- all ------------------------------------------------------------------------------------


def jobs_of(arguments: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    """Return the measurements by name."""
    found: dict[str, Callable[[], Row]] = {}
    process = cache(process_memory)
    for dtype in arguments.dtypes:
        for world in (2, 3, 4) if "bytes" in arguments.parts else ():
            for reduction in ("exact", "fast"):
                case = case_of(arguments.sizes[0], dtype, 1, warmup=1, steps=1, length=128)
                job = bytes_job(world, case.replace(extra={"reduction": reduction}))
                found[f"bytes/{arguments.sizes[0]}/{dtype}/{world}/{reduction}"] = job
        for size in arguments.sizes:
            for rows in arguments.rows if "speed" in arguments.parts else ():
                case = case_of(size, dtype, rows, steps=arguments.steps, activations=arguments.activations)
                name = f"{size}, {dtype}, {4 // rows} micro-batches"
                found[f"speed/{name}"] = speed_job(case, arguments.peers)
            for world in (1, 2, 4) if "memory" in arguments.parts else ():
                case = case_of(size, dtype, 1, activations="recompute", length=arguments.memory_length)
                found[f"memory/{size}, {dtype}, ranks: {world}"] = memory_job(
                    world, case, arguments.runs, process
                )
            if "alone" in arguments.parts and arguments.before is not None:
                case = case_of(size, dtype, 1, steps=2 * arguments.steps, threads=2)
                found[f"alone/{size}, {dtype}"] = alone_job(case, arguments.before)
    return found


def fill(report: Report, ledger: Ledger) -> None:
    """Add the tables of all results."""
    rows = {name: list(_of(ledger, name)) for name in ("bytes", "speed", "memory", "alone")}
    if rows["bytes"]:
        report.section("Bytes that a rank sends in a step")
        head = ["ranks", "dtype", "reduction", "MB, counted", "MB, sum of its collectives", "MB, formula"]
        note = "4 micro-batches of 128 tokens. The sum of the step's collectives holds to the byte."
        cells = [bytes_cells(row) for _, row in rows["bytes"]]
        report.table([*head, "counted / formula"], cells, note=note)
    if rows["speed"]:
        report.section("Speed at 2,048 tokens a step, on two cores")
        head = ["case", "system", "tokens/s", "ratio to one rank (least to most)", "ratio of CPU time"]
        cells = [each for job, row in rows["speed"] for each in speed_cells(job, row)]
        loads = "; ".join(
            f"{job}: {', '.join(f'{x:.1f}' for x in row['load'])}" for job, row in rows["speed"]
        )
        note = "One rank has two threads, two ranks have one each. Medians of the steps' ratios; above 1 is "
        note += f"faster than one rank. Load of the machine before and after (others use it): {loads}."
        report.table([*head, "losses differ by", "wanted", "met"], cells, note=note)
        report.section("Collectives of one step, two ranks")
        head = ["case", "system", "s in collectives", "s waiting, by rank", "s in small values, by rank"]
        cells = [each for job, row in rows["speed"] for each in network_cells(job, row)]
        report.table([*head, "step, s", "collectives / step"], cells)
    if rows["memory"]:
        report.section("Memory of a rank")
        head = ["case", "MB of each rank, measured", "predicted", "largest error", "within 3 %"]
        size, share = rows["memory"][0][1]["process"]
        note = "VmHWM, medians of runs; 4 micro-batches. The prediction is the planner's, with "
        note += f"{size / 1e6:,.0f} MB for a process without a model and {share:.0%} of transient memory for "
        note += "the heap, measured on this machine with one rank."
        report.table(head, [memory_cells(job, row) for job, row in rows["memory"]], note=note)
    if rows["alone"]:
        report.section("One rank, before and after")
        head = ["case", "tokens/s", "now / before, wall", "CPU time", "equal losses", "peak memory"]
        note = "Above 1 is faster now. Two threads, 4 micro-batches of 512 tokens; steps alternate."
        report.table(head, [alone_cells(job, row) for job, row in rows["alone"]], note=note)


def _of(ledger: Ledger, part: str) -> list[tuple[str, Row]]:
    return [(job.partition("/")[2], row) for job, row in ledger.rows.items() if job.startswith(f"{part}/")]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Several ranks on the CPUs of this machine.")
    parts = ["bytes", "speed", "memory", "alone"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--sizes", nargs="+", default=["30m", "100m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2], help="sequences in a micro-batch")
    parser.add_argument("--activations", default="recompute")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3, help="processes whose memory is measured")
    parser.add_argument("--memory-length", type=int, default=512, help="tokens of a sequence, for memory")
    parser.add_argument("--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES))
    parser.add_argument("--before", type=Path, help="an earlier checkout, with its C++ optimizer built")
    parser.add_argument("--fresh", action="store_true", help="repeat these measurements of this commit")
    parser.set_defaults(work=WORK)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    torch.set_num_threads(1)
    ledger = Ledger(arguments.work / "many-ranks.jsonl", f"{sources()}, {cpu_name()}")
    shown = [Path(word).name if os.sep in word else word for word in argv]
    command = " ".join(["python -m benchmarks many_ranks", *shown])
    for job, run in jobs_of(arguments).items():
        if arguments.fresh or ledger.get(job) is None:
            print(f"{job}: {ledger.add(job, run()).get('status')}", flush=True)
    report = Report("many-ranks-cpu", __doc__ or "", command=command)
    fill(report, ledger)
    report.write()


if __name__ == "__main__":
    main()
