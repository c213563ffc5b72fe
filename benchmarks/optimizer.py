"""The host update: bytes per second relative to memory speed, time per parameter relative to peers.

Everything runs alternately in one process (the order reverses every other round), so changes of the
machine's speed affect all; figures are medians, ratios are medians of the rounds' ratios. All buffers, also
the peers', are on the huge pages of memory/arena.py, and all run on the same threads.

- triad: STREAM's a = b + s c, counted as in STREAM, 12 bytes per element, although writing `a` also reads
  it. Triad in place: a = a + s b, 12 bytes that all cross the bus, as in the update: the fair measure.
- The kernel reads a bf16 gradient, writes the bf16 weights, and clips. The peers get fp32 gradients on fp32
  parameters, do not clip, and then cast to the bf16 copy that a device needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch

from horizon_lm.machine.cores import choose_threads
from horizon_lm.memory.arena import allocate
from horizon_lm.optim import kernel
from horizon_lm.optim.rules import ADAPTIVE_RULES, Hyper, Numbers, Tensors

from .report import Report

Action = Callable[[], object]
HYPER = Hyper(lr=1e-6, weight_decay=0.01, momentum=0.9)
STREAM, IN_PLACE, KERNEL = "triad", "triad in place", "kernel adamw"
TORCH, DEEPSPEED = "torch AdamW(fused) + cast", "DeepSpeedCPUAdam + cast"


def block(count: int, dtype: torch.dtype, scale: float = 0.0) -> torch.Tensor:
    """Allocate a 1-D [count] block on huge pages and touch every page."""
    run = allocate(count * dtype.itemsize).view(dtype)
    if scale:
        pattern = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
        for part in run.split(len(pattern)):
            part.copy_(pattern[: len(part)])
        return run
    return run.zero_()


def triads(count: int, threads: int) -> dict[str, tuple[Action, int]]:
    """Return {name: (action, bytes per element)}."""
    lib = kernel.library()
    assert lib is not None
    a, b, c = (block(count, torch.float32, 1.0) for _ in range(3))

    def run(third: torch.Tensor | None) -> None:
        pointer = None if third is None else third.data_ptr()
        lib.horizon_triad(a.data_ptr(), b.data_ptr(), pointer, 1e-3, count, threads)

    return {STREAM: (lambda: run(c), 12), IN_PLACE: (lambda: run(None), 12)}


def kernels(count: int, threads: int) -> dict[str, tuple[Action, int]]:
    """Return {name: (action, bytes per parameter)} for the rules, moments and instruction sets."""
    weights, grads = (block(count, torch.bfloat16, scale) for scale in (0.02, 1e-3))
    residual = block(count, torch.int16)
    wide = [block(count, torch.float32, 1e-3), block(count, torch.float32, 1e-3).square_()]
    narrow = [run.to(torch.bfloat16) for run in wide]

    def action(rule: str, moments: list[torch.Tensor], isa: str) -> tuple[Action, int]:
        count_of_moments = 2 if rule in ADAPTIVE_RULES else 1
        square = moments[1] if count_of_moments == 2 else None
        size = 10 + 2 * moments[0].dtype.itemsize * count_of_moments
        tensors = Tensors(weights, residual, grads, moments[0], square)
        numbers = Numbers(rule, HYPER, step=5, grad_scale=0.999)
        return lambda: kernel.update(tensors, numbers, threads=threads, isa=isa), size

    found = {KERNEL: action("adamw", wide, "auto")}
    found |= {f"kernel {rule}": action(rule, wide, "auto") for rule in ("lion", "sgd")}
    found["kernel adamw, bf16 moments"] = action("adamw", narrow, "auto")
    for isa in kernel.available_isas():
        if isa not in ("plain", kernel.auto_isa()):
            found[f"{KERNEL}, {isa}"] = action("adamw", wide, isa)
    return found


def peers(count: int) -> dict[str, Action]:
    """Return fused optimizers on fp32 parameters, with the cast to bf16 after each step."""
    found: dict[str, Action] = {}
    parameter = torch.nn.Parameter(block(count, torch.float32, 0.02))
    parameter.grad = block(count, torch.float32, 1e-3)
    copy = block(count, torch.bfloat16)
    moments = {name: block(count, torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def step_and_cast(optimizer: torch.optim.Optimizer) -> Action:
        optimizer.step()  # allocates its own moments on ordinary pages; ours replace them
        optimizer.state[parameter].update(moments)

        def run() -> None:
            optimizer.step()
            with torch.no_grad():
                copy.copy_(parameter)

        return run

    found[TORCH] = step_and_cast(torch.optim.AdamW([parameter], lr=1e-6, fused=True))
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return found
    found[DEEPSPEED] = step_and_cast(DeepSpeedCPUAdam([parameter], lr=1e-6, weight_decay=0.01))
    return found


def measure(actions: dict[str, Action], rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Run all actions alternately; return {clock: {name: nanoseconds per element of each round}}."""
    for action in actions.values():
        action()
    found: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in actions} for clock in ("wall", "cpu")
    }
    for round_ in range(rounds):
        names = list(actions)
        for name in names if round_ % 2 else reversed(names):
            wall, cpu = time.perf_counter(), time.process_time()
            actions[name]()
            found["wall"][name].append((time.perf_counter() - wall) / count * 1e9)
            found["cpu"][name].append((time.process_time() - cpu) / count * 1e9)
    return found


def ratio(over: list[float], under: list[float], factor: float = 1.0) -> str:
    """Return the median of the rounds' ratios, with minimum and maximum."""
    values = sorted(factor * a / b for a, b in zip(over, under, strict=True))
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The C++ update against memory speed and its peers.")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    if kernel.library() is None:
        return
    count, threads = arguments.parameters, choose_threads(arguments.threads)
    torch.set_num_threads(threads)
    options = f" ARGS='{' '.join(argv)}'" if argv else ""
    report = Report("optimizer-cpu", __doc__ or "", command=f"make bench-optimizer{options}")
    fill(report, count, threads, arguments.rounds)
    print("\n\n".join(report.parts[-3:]))
    report.write()


def fill(report: Report, count: int, threads: int, rounds: int) -> None:
    """Measure, and add the tables to a report."""
    sized = triads(count, threads) | kernels(count, threads)
    others = peers(count)
    actions = {name: action for name, (action, _) in sized.items()} | others
    found = measure(actions, rounds, count)
    sizes = {name: size for name, (_, size) in sized.items()} | dict.fromkeys(others, None)
    rows = []
    for name, size in sizes.items():
        wall, cpu = (statistics.median(found[clock][name]) for clock in ("wall", "cpu"))
        bandwidth = f"{size / wall:.1f}" if size else ""
        rows.append([name, f"{wall:.3f}", f"{min(found['wall'][name]):.3f}", f"{cpu:.3f}", bandwidth])
    head = ["action", "ns/parameter, median", "least", "CPU ns/parameter", "GB/s (median)"]
    note = (
        f"{count / 1e6:.0f} M parameters, {rounds} rounds, {kernel.auto_isa()}, {threads} threads; "
        f"{' and '.join(versions())}; load {os.getloadavg()[0]:.1f} at the end."
    )
    report.table(head, rows, note=note)
    report.table(["measure", "target", "wall", "CPU time"], comparisons(found, sizes))


def versions() -> list[str]:
    """Return the peers' versions."""
    try:
        return [f"torch {torch.__version__}", f"deepspeed {metadata.version('deepspeed')}"]
    except metadata.PackageNotFoundError:
        return [f"torch {torch.__version__}", "deepspeed not installed"]


def comparisons(found: dict[str, dict[str, list[float]]], sizes: dict[str, int | None]) -> list[list[str]]:
    """Return rows: measure, target, ratio by wall clock, ratio by CPU time."""
    rows = []
    for name in (STREAM, IN_PLACE):
        factor = (sizes[KERNEL] or 0) / (sizes[name] or 1)
        values = [ratio(found[clock][name], found[clock][KERNEL], factor) for clock in ("wall", "cpu")]
        rows.append([f"kernel bytes/s over {name}", "0.85 or more", *values])
    for name in (TORCH, DEEPSPEED):
        if name in sizes:
            values = [ratio(found[clock][KERNEL], found[clock][name]) for clock in ("wall", "cpu")]
        else:
            values = ["not installed", ""]
        rows.append([f"kernel time over {name}", "0.75 or less", *values])
    return rows


if __name__ == "__main__":
    main()
