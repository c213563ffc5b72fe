"""Rates of this machine: links, memory, registration, update and matrix products, each measured separately.

The CPU runs what it can; rows that need a GPU say so. Triad and update: benchmarks/optimizer.py. Both link
directions at once, and the matrix rate, use the functions of the planner's calibration. A copy's GB/s
counts the bytes that arrive, a triad's 12 bytes per element.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from horizon_lm.machine.cores import choose_threads
from horizon_lm.memory import arena
from horizon_lm.memory.layout import lay_out
from horizon_lm.memory.slots import WeightSlots
from horizon_lm.memory.store import HostStore, StoreSpec
from horizon_lm.optim import kernel
from horizon_lm.plan.rates import link_rates
from horizon_lm.report.flops import measure_peak

from . import optimizer
from .report import Report

NEEDS_GPU = "needs a CUDA device: has not run"


def seconds_of(action: Callable[[], object], rounds: int, settle: Callable[[], None] = lambda: None) -> float:
    """Return the median time, after one warm-up."""
    action()
    found = []
    for _ in range(rounds):
        settle()
        start = time.perf_counter()
        action()
        settle()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def matrix_rows(device: torch.device) -> list[list[str]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rate = measure_peak(device, dtype)
        rows.append(
            [
                f"matrix product, {str(dtype).removeprefix('torch.')}, {device.type}",
                f"{rate / 1e12:.2f} TFLOP/s",
            ]
        )
    return rows


def triad_rows(count: int, rounds: int, most: int) -> list[list[str]]:
    """Return threads, STREAM's triad and the in-place triad in GB/s, for 1, 2, 4, ... threads."""
    if kernel.library() is None:
        return [["triad", "needs the C++ kernel", ""]]
    rows, threads = [], [1]
    while threads[-1] * 2 <= most:
        threads.append(threads[-1] * 2)
    for number in sorted({*threads, most}):
        actions = optimizer.triads(count, number)
        rates = [size * count / seconds_of(action, rounds) / 1e9 for action, size in actions.values()]
        rows.append([str(number), *(f"{rate:.1f}" for rate in rates)])
    return rows


def registration_rows(num_bytes: int) -> list[list[str]]:
    """Time touching new pages, and registering them with the device."""

    def touch() -> None:
        arena.allocate(num_bytes).fill_(1)

    rows = [["touch new host pages", f"{num_bytes / seconds_of(touch, 3) / 1e9:.2f} GB/s"]]
    if not torch.cuda.is_available():
        return [*rows, ["register (pin) host pages", NEEDS_GPU]]
    rate = num_bytes / seconds_of(lambda: arena.allocate(num_bytes, pin=True), 3) / 1e9
    return [*rows, ["allocate and register (pin) host pages", f"{rate:.2f} GB/s"]]


def link_rows(num_bytes: int) -> list[list[str]]:
    """Time pinned copies in each direction alone, and in both at once."""
    if not torch.cuda.is_available():
        return [[name, NEEDS_GPU] for name in ("pinned H2D", "pinned D2H", "pinned H2D and D2H at once")]
    host = arena.allocate(num_bytes, pin=True)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    ways = {"pinned H2D": (device, host), "pinned D2H": (host, device)}
    rows = []
    for name, (target, source) in ways.items():

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)

        rate = num_bytes / seconds_of(copy, 5, torch.cuda.synchronize) / 1e9
        rows.append([name, f"{rate:.1f} GB/s"])
    up, down = link_rates(num_bytes)
    return [*rows, ["pinned H2D and D2H at once", f"{up / 1e9:.1f} and {down / 1e9:.1f} GB/s"]]


def upload_rows(numel: int, device: torch.device) -> list[list[str]]:
    """Time a unit's upload into a slot and a plain `copy_` of as many bytes from the same memory."""
    pin = device.type == "cuda"
    layout = lay_out("layer", [("weight", (numel,), True, torch.bfloat16)], torch.bfloat16)
    store = HostStore([layout], StoreSpec(torch.bfloat16), pin=pin)
    slots = WeightSlots(store, [layout.slot_numel] * 2, device, alias=False)
    source, target = store.run("weights", 0), torch.empty(numel, dtype=torch.bfloat16, device=device)

    def settle() -> None:
        if pin:
            torch.cuda.synchronize()

    actions = {
        "slot upload": lambda: slots.upload(0, 0),
        "plain copy_": lambda: target.copy_(source, non_blocking=True),
    }
    where = "to the device" if pin else "within host memory"
    rates = {name: 2 * numel / seconds_of(action, 9, settle) / 1e9 for name, action in actions.items()}
    rows = [[f"{name}, {where}", f"{rate:.1f} GB/s"] for name, rate in rates.items()]
    return [*rows, ["slot upload over plain copy_", f"{rates['slot upload'] / rates['plain copy_']:.3f}"]]


def fill(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Measure, and add the tables to a report; return the rows of the first."""
    small = arguments.rehearse
    num_bytes, numel = (1 << 20, 1 << 16) if small else (1 << 28, 1 << 26)
    device = torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
    threads = choose_threads(arguments.threads)
    rows = matrix_rows(torch.device("cpu")) + (matrix_rows(device) if device.type == "cuda" else [])
    rows += registration_rows(num_bytes) + upload_rows(numel, device) + link_rows(num_bytes)
    report.section("This machine")
    report.table(["measure", "found"], rows, note="Medians.")
    count = 1 << 16 if small else 1 << 26
    report.section("Host memory by threads")
    head = ["threads", "triad, GB/s", "triad in place, GB/s"]
    report.table(head, triad_rows(count, 2 if small else 5, threads))
    report.section("The update on the host")
    if kernel.library() is None:
        report.parts.append("The C++ kernel could not be built: has not run.")
    else:
        optimizer.fill(report, count, threads, 2 if small else arguments.rounds)
    return rows


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Links, memory, update and matrix rate of this machine.")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rehearse", action="store_true", help="run at a small size, as a check")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    place = "gpu" if torch.cuda.is_available() else "cpu"
    command = " ".join(["python -m benchmarks micro", *argv])
    report = Report(f"micro-{place}", __doc__ or "", command=command)
    fill(report, arguments)
    print("\n\n".join(report.parts[4:]))
    if not arguments.rehearse:
        report.write()


if __name__ == "__main__":
    main()
