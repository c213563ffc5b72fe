"""Rates of this machine: links, memory, registration, update and matrix products, each measured separately.

The CPU runs what it can; rows that need a GPU say so. Link rates, in one direction and in both at once, and
the matrix rate use the functions of the planner's calibration. A copy's GB/s counts the bytes that arrive, a
triad's 12 bytes per element, an update's 26 bytes per parameter (bf16 weights and gradients, int16
residuals, two fp32 moments).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from horizon_lm.machine.cores import choose_threads
from horizon_lm.memory import arena
from horizon_lm.memory.layout import lay_out
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.memory.slots import WeightSlots
from horizon_lm.memory.store import HostStore
from horizon_lm.optim import kernel
from horizon_lm.plan.rates import link_rates
from horizon_lm.report.flops import measure_peak

from . import micro_layer, micro_probe, optimizer
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


def thread_rows(count: int, rounds: int, numbers: Sequence[int]) -> list[list[str]]:
    """Return threads, STREAM's triad, the triad in place and the update in GB/s, and ns per parameter."""
    if kernel.library() is None:
        return [["triad and update", "needs the C++ kernel", "", "", ""]]
    rows = []
    for number in numbers:
        actions = [*optimizer.triads(count, number).values()]
        actions.append(optimizer.kernels(count, number)[optimizer.KERNEL])
        times = [seconds_of(action, rounds) for action, _ in actions]
        rates = [f"{size * count / time / 1e9:.1f}" for time, (_, size) in zip(times, actions, strict=True)]
        rows.append([str(number), *rates, f"{times[-1] / count * 1e9:.3f}"])
    return rows


def doubling(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({*(1 << i for i in range(most.bit_length())), most})


def registration_rows(num_bytes: int) -> list[list[str]]:
    """Time touching new pages, and registering them with the device."""

    def touch() -> None:
        arena.allocate(num_bytes).fill_(1)

    rows = [["touch new host pages", f"{num_bytes / seconds_of(touch, 3) / 1e9:.2f} GB/s"]]
    if not torch.cuda.is_available():
        return [*rows, ["register (pin) host pages", NEEDS_GPU]]
    rate = num_bytes / seconds_of(lambda: arena.allocate(num_bytes, pin_for=torch.device("cuda")), 3) / 1e9
    return [*rows, ["allocate and register (pin) host pages", f"{rate:.2f} GB/s"]]


def link_rows(num_bytes: int) -> list[list[str]]:
    """Time copies of registered memory in each direction alone, and in both at once."""
    names = ["registered H2D", "registered D2H", "registered H2D and D2H at once"]
    if not torch.cuda.is_available():
        return [[name, NEEDS_GPU] for name in names]
    found = link_rates(num_bytes)
    both = f"{found.up / 1e9:.1f} and {found.down / 1e9:.1f} GB/s"
    alone = [f"{rate / 1e9:.1f} GB/s" for rate in (found.up_alone, found.down_alone)]
    return [[name, text] for name, text in zip(names, [*alone, both], strict=True)]


def upload_rows(numel: int, device: torch.device) -> list[list[str]]:
    """Time a unit's upload into a slot and a plain `copy_` of as many bytes from the same memory."""
    pin = device.type == "cuda"
    layout = lay_out("layer", [("weight", (numel,), True, torch.bfloat16)], torch.bfloat16)
    store = HostStore([layout], StoreSpec(torch.bfloat16), pin_for=device)
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


@dataclass(frozen=True)
class Sizes:
    """Device and sizes of the measurements. threads: of the update; None: 1, 2, 4, ..., all usable cores."""

    device: torch.device
    num_bytes: int
    numel: int
    count: int
    rounds: int
    threads: list[int] | None

    @property
    def all_threads(self) -> int:
        return choose_threads(max(self.threads) if self.threads else None)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Sizes:
        given = arguments.threads
        if arguments.dry_run:
            return cls(torch.device("cpu"), 1 << 20, 1 << 16, 1 << 16, 2, given)
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), 1 << 30, 1 << 27, 1 << 27, arguments.rounds, given)
        return cls(torch.device("cpu"), 1 << 28, 1 << 26, 1 << 26, arguments.rounds, given)


Rows = list[list[str]]


def _probe(report: Report, sizes: Sizes) -> Rows:
    rows = micro_probe.rows()
    report.table(["machine", "found"], rows)
    return rows


def _matrix(report: Report, sizes: Sizes) -> Rows:
    kinds = [torch.device("cpu"), *([sizes.device] if sizes.device.type == "cuda" else [])]
    rows = [row for device in kinds for row in matrix_rows(device)]
    report.table(["measure", "found"], rows, note="The best of six.")
    return rows


def _links(report: Report, sizes: Sizes) -> Rows:
    rows = registration_rows(sizes.num_bytes) + upload_rows(sizes.numel, sizes.device)
    rows += link_rows(sizes.num_bytes)
    report.table(["measure", "found"], rows, note="Medians.")
    return rows


def _update(report: Report, sizes: Sizes) -> Rows:
    head = ["threads", "triad, GB/s", "triad in place, GB/s", "update, GB/s", "update, ns/parameter"]
    usable = choose_threads()
    numbers = [n for n in sizes.threads or doubling(usable) if n <= usable] or [usable]
    rows = thread_rows(sizes.count, min(5, sizes.rounds), numbers)
    report.table(head, rows, note=f"{sizes.count / 1e6:.0f} M parameters.")
    return [[f"update, {row[0]} threads", f"{row[3]} GB/s"] for row in rows if row[3]]


def _optimizer(report: Report, sizes: Sizes) -> Rows:
    if kernel.library() is None:
        report.parts.append("The C++ kernel could not be built: has not run.")
    else:
        optimizer.fill(report, sizes.count, sizes.all_threads, sizes.rounds)
    return []


def _layer(report: Report, sizes: Sizes) -> Rows:
    rows = micro_layer.rows(sizes.device, small=sizes.num_bytes < 1 << 28)
    report.table(micro_layer.HEAD, rows, note=micro_layer.__doc__ or "")
    return []


# Title and function by part.
PARTS: dict[str, tuple[str, Callable[[Report, Sizes], Rows]]] = {
    "probe": ("This machine", _probe),
    "matrix": ("Matrix products", _matrix),
    "links": ("Registration, uploads and the host link", _links),
    "update": ("Host memory and the update by threads", _update),
    "optimizer": ("The update on the host compared with others", _optimizer),
    "layer": ("One layer of Qwen3-4B", _layer),
}
USUAL = ("matrix", "links", "update", "optimizer")


def fill(report: Report, arguments: argparse.Namespace) -> Rows:
    """Measure, and add the tables to a report; return rows of name and figure."""
    sizes, rows = Sizes.of(arguments), []
    for name in arguments.part:
        title, measure = PARTS[name]
        report.section(title)
        rows += measure(report, sizes)
    return rows


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Links, memory, update and matrix rate of this machine.")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(USUAL))
    parser.add_argument("--threads", type=int, nargs="+", help="of the update (default: 1, 2, 4, ..., all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="check: run at a small size on the CPU")
    parser.add_argument("--json", type=Path, help="write the tables to this file instead of a results file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    place = "gpu" if torch.cuda.is_available() else "cpu"
    command = " ".join(["python -m benchmarks micro", *argv])
    report = Report(f"micro-{place}", __doc__ or "", command=command)
    first = len(report.parts)
    fill(report, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"parts": report.parts[first:]}))
        return 0
    print("\n\n".join(report.parts[first:]))
    if not arguments.dry_run:
        report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
