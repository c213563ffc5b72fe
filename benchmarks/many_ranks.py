"""Several ranks on the CPUs of this machine (Gloo, loopback): bytes, collectives, speed, memory.

bytes: what each rank sends in a step, counted, beside the formula of docs/guides/many-gpus.md and the sum over
the step's collectives. network: seconds of a step in collectives; waiting is what a rank spends in them beyond
the fastest rank. speed: two ranks of one thread beside one rank of two threads and beside FSDP2 with CPU offload
and DeepSpeed ZeRO-3, two ranks each; steps of all alternate. memory: peak resident memory of each rank beside
the plan's. alone: one rank beside one of an earlier checkout (`--before FOLDER`), alternating.

Both ranks share the cores, memory and loopback of one machine: ratios say what several ranks cost, not what a
network gives. Nothing here ran on a GPU, and NCCL has not run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from horizon_lm.bench.figures import Row, spread
from horizon_lm.bench.jobs import OURS, TORCH, Worker, measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

from .peers import PEERS
from .rank_group import RANKS, CheckoutWorker, RankGroup, by_threads
from .report import Report

WANTED = 0.85  # of the speed of one rank, for two ranks on the same cores
PEER_NAMES = ("fsdp2-offload", "zero3-offload")


def case_of(size: str, dtype: str, rows: int, **changes: Any) -> Case:
    """Return a step of 2,048 tokens: 4 sequences of 512, `rows` in a micro-batch."""
    case = Case(shape(size), length=512, sequences=4, rows=rows, dtype=dtype, warmup=2, steps=7, lr=3e-4)
    return case.replace(**changes)


# ---- bytes ----------------------------------------------------------------------------------


def formula(parameters: int, layers: int, world: int, positions: int, fast: bool, size: int) -> float:
    """Return the bytes that a rank sends in a step, by the guide's formula.

    parameters, layers: trainable ones of the whole model, and those of its layers alone. positions:
    micro-batches of a rank. size: bytes of a weight, and of a micro-batch's gradient.
    """
    weights = size * (parameters + layers)  # layers once more, for their backward pass
    gradients = 4 * parameters if fast else size * parameters * positions
    return (world - 1) / world * (weights + gradients)


def by_ops(row: Row, world: int, fast: bool, size: int) -> float:
    """Return the bytes of the collectives that the recorded step ran."""
    units, found = row["info"]["units"], row["breakdown"]
    rows = math.ceil(found["rows"] * row["info"]["width"] / world)
    total, last = 0.0, None
    for name, _ in found["network"]:
        kind, unit = name[0], int(name[1:].partition(".")[0])
        weights, trainable = units[unit]
        if kind == "J":
            total += size * weights
        elif kind == "T":
            total += (4 if fast else size) * trainable
        else:
            total, last = total + (4 if fast else size) * rows, rows
    total += 4 * (last or 0)  # the sums of rows go to all ranks
    return (world - 1) * total


def count_bytes(report: Report, arguments: argparse.Namespace) -> None:
    """Count what ranks send at several worlds, dtypes and reductions."""
    rows = []
    for world in (2, 3, 4):
        for dtype in ("float32", "bfloat16"):
            for reduction in ("exact", "fast"):
                case = case_of(arguments.sizes[0], dtype, 1, warmup=1, steps=1, threads=1, length=128)
                case = case.replace(extra={"reduction": reduction})
                rows.append(_bytes_row(world, reduction, case))
                print(" | ".join(rows[-1]), flush=True)
    head = ["ranks", "dtype", "reduction", "micro-batches", "MB sent by a rank", "collectives, MB", "formula, MB"]
    report.section("Bytes sent in a step")
    report.table([*head, "sent / formula"], rows)


def _bytes_row(world: int, reduction: str, case: Case) -> list[str]:
    kind: Any = partial(RankGroup, world=world)
    row = measure([(RANKS, case)], kind=kind)[0]
    name = [str(world), case.dtype, reduction, str(case.sequences)]
    if row["status"] != "done":
        return [*name, f"{row['status']}: {row.get('why')}", "", "", ""]
    fast, size = reduction == "fast", case.torch_dtype.itemsize
    layers = int(case.model["num_hidden_layers"])
    numels = [trainable * world for _, trainable in row["info"]["units"]]
    positions = -(-case.sequences // world)
    wanted = formula(row["parameters"], sum(numels[1 : layers + 1]), world, positions, fast, size)
    sent = {answer["breakdown"]["sent"] for answer in row["ranks"]}
    counted = by_ops(row, world, fast, size)
    cells = [f"{min(sent) / 1e6:.2f}", f"{counted / 1e6:.2f}", f"{wanted / 1e6:.2f}"]
    return [*name, *cells, f"{min(sent) / wanted:.3f}"]


# ---- collectives and speed ------------------------------------------------------------------


def network_cells(row: Row) -> list[str]:
    """Return, for each rank of the recorded step, seconds in collectives and waiting, and of the step."""
    breakdowns = [answer["breakdown"] for answer in row["ranks"]]
    spans = [[seconds for _, seconds in found["network"]] for found in breakdowns]
    fastest = [min(each) for each in zip(*spans, strict=True)]
    waits = [sum(own) - sum(fastest) for own in spans]
    exchanges = [found["exchanges"] for found in breakdowns]
    step = max(found["seconds"] for found in breakdowns)
    shown: Callable[[Sequence[float]], str] = lambda values: ", ".join(f"{v:.3f}" for v in values)  # noqa: E731
    return [f"{sum(fastest):.3f}", shown(waits), shown(exchanges), f"{step:.3f}", f"{sum(fastest) / step:.1%}"]


def compare(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Alternate two ranks, one rank, plain torch and the peers."""
    rows, network = [], []
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            for per_micro_batch in arguments.rows:
                found = _measured(size, dtype, per_micro_batch, arguments)
                name = [size, dtype, f"{4 // per_micro_batch} x {per_micro_batch * 512}"]
                rows += [[*name, *cells] for cells in speed_rows(found)]
                print("\n".join(" | ".join(r) for r in rows[-len(found) :]), flush=True)
                exact = found["ours, 2 ranks, exact"], found["ours, 2 ranks, fast"]
                for what, row in zip(("exact", "fast"), exact, strict=True):
                    if row["status"] == "done":
                        network.append([*name, what, *network_cells(row)])
    report.section("Speed at 2,048 tokens a step, on two cores")
    head = ["model", "dtype", "micro-batches", "system", "tokens/s", "ratio to one rank (least to most)"]
    note = "One rank: ours, two threads. Ranks: two processes of one thread. Medians of the steps' ratios."
    report.table([*head, "CPU time ratio", "losses differ by", "wanted", "met"], rows, note=note)
    report.section("Collectives of a step, two ranks")
    head = ["model", "dtype", "micro-batches", "reduction", "s in collectives", "s waiting, by rank"]
    report.table([*head, "s in exchanges of small values, by rank", "step, s", "share"], network)
    return rows


def _measured(size: str, dtype: str, rows: int, arguments: argparse.Namespace) -> dict[str, Row]:
    case = case_of(size, dtype, rows, steps=arguments.steps, activations=arguments.activations)
    one, two = case.replace(threads=2), case.replace(threads=1)
    systems = {
        "ours, 1 rank": (OURS, one),
        "ours, 2 ranks, exact": (RANKS, two.replace(extra={"reduction": "exact"})),
        "ours, 2 ranks, fast": (RANKS, two.replace(extra={"reduction": "fast"})),
        "plain torch, 1 process": (TORCH, one),
    }
    systems |= {f"{name}, 2 ranks": (PEERS[name].target, two) for name in arguments.peers}
    found = measure(list(systems.values()), kind=by_threads(2))  # type: ignore[arg-type]
    return dict(zip(systems, found, strict=True))


def speed_rows(found: dict[str, Row]) -> list[list[str]]:
    base, rows = found["ours, 1 rank"], []
    for name, row in found.items():
        if row["status"] != "done" or base["status"] != "done":
            rows.append([name, f"{row['status']}: {row.get('why', '')}", "", "", "", "", ""])
            continue
        ratios = [
            spread([a / b for a, b in zip(base[clock], row[clock], strict=True)])
            for clock in ("seconds", "cpu_seconds")
        ]
        apart = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], base["losses"], strict=True))
        wanted = name == "ours, 2 ranks, exact"
        met = "yes" if ratios[0].median >= WANTED else f"NO, {1 - ratios[0].median / WANTED:.0%} short"
        cells = [f"{row['tokens_per_second'][0]:,.0f}", ratios[0].text(3), f"{ratios[1].median:.2f}"]
        rows.append([name, *cells, f"{apart:.0e}", f"{WANTED}" if wanted else "", met if wanted else ""])
    return rows


# ---- one rank, before and after -------------------------------------------------------------


def alone(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Alternate one rank with one of an earlier checkout: the same case, the same machine."""
    if arguments.before is None:
        report.section("One rank, before and after", "Not measured: no `--before FOLDER`.")
        return []
    rows = []
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            case = case_of(size, dtype, 1, steps=2 * arguments.steps, threads=2, activations=arguments.activations)
            before = case.replace(extra=dict(case.extra))
            now, then = measure([(OURS, case), (OURS, before)], kind=_one_of(arguments.before))  # type: ignore[arg-type]
            ratios = [
                spread([b / a for a, b in zip(now[clock], then[clock], strict=True)]).text(3)
                for clock in ("seconds", "cpu_seconds")
            ]
            same = "yes" if now["losses"] == then["losses"] else "NO"
            peaks = now["peaks"]["host"] / then["peaks"]["host"]
            rows.append([size, dtype, f"{now['tokens_per_second'][0]:,.0f}", *ratios, same, f"{peaks:.3f}"])
            print(" | ".join(rows[-1]), flush=True)
    report.section("One rank, before and after", f"Before: the checkout `{arguments.before.name}`.")
    head = ["model", "dtype", "tokens/s", "now / before, wall", "CPU time", "equal losses", "peak memory"]
    report.table(head, rows, note="Above 1: faster now. Two threads; steps alternate.")
    return rows


def _one_of(checkout: Path) -> Callable[..., Worker]:
    """Return a kind of worker whose second instance is of the checkout."""
    made: list[Worker] = []

    def make(system: str, case: Case, *, deadline: float) -> Worker:
        kind: Any = partial(CheckoutWorker, checkout=checkout.resolve()) if made else Worker
        made.append(kind(system, case, deadline=deadline))
        return made[-1]

    return make


PARTS: dict[str, Callable[[Report, argparse.Namespace], object]] = {
    "bytes": count_bytes,
    "speed": compare,
    "alone": alone,
}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=["30m", "100m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2], help="sequences in a micro-batch")
    parser.add_argument("--activations", default="recompute")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES))
    parser.add_argument("--before", type=Path, help="an earlier checkout, with its C++ optimizer built")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    torch.set_num_threads(1)
    shown = [Path(word).name if "/" in word else word for word in argv]
    report = Report("many-ranks-cpu", __doc__ or "", command=" ".join(["python -m benchmarks many_ranks", *shown]))
    for part in arguments.parts:
        print(f"== {part}", flush=True)
        PARTS[part](report, arguments)
    report.write()


if __name__ == "__main__":
    main()
