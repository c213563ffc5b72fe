"""Value of keeping freed memory on the CPU (`memory.arena.keep_freed_memory`): peak and speed under other
limits of the C library's malloc.

The planner's cases (benchmarks/planner.py) run alternately, each in its own process; an environment with
MALLOC_* leaves malloc alone. `ours` never returns memory; others serve blocks from a size on through mmap,
which returns them at once; `default` is glibc's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from .report import Report

_NEVER = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
VARIANTS: dict[str, dict[str, str]] = {
    "ours": {},
    "default": {"MALLOC_ARENA_TEST": "8"},  # glibc's default: no effect
    "mmap from 32 MB": _NEVER | {"MALLOC_MMAP_THRESHOLD_": str(32 << 20)},
    "mmap from 1 MB": _NEVER | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["small, long", "small, recompute"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = []
    for case in arguments.cases:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        for _ in range(arguments.runs):
            for name, limits in VARIANTS.items():
                command = [sys.executable, "-m", "benchmarks.planner", f"--case={case}", "--steps=3"]
                done = subprocess.run(
                    command, env={**os.environ, **limits}, capture_output=True, text=True, check=True
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        base = statistics.median(run["seconds"] for run in found["ours"])
        for name, runs in found.items():
            peaks = sorted(run["bytes"] / 1e6 for run in runs)
            seconds = statistics.median(run["seconds"] for run in runs)
            cells = [f"{statistics.median(peaks):,.0f} ({peaks[0]:,.0f} to {peaks[-1]:,.0f})"]
            rows.append([case, name, *cells, f"{seconds:.3f}", f"{seconds / base:.2f}"])
            print(" | ".join(rows[-1]), flush=True)
    report = Report("heap-cpu", __doc__ or "")
    head = ["case", "malloc", "host MB at the peak", "CPU s a step", "time over ours"]
    report.table(head, rows, note=f"Medians (least to most) of {arguments.runs} processes; one thread.")
    report.write()


if __name__ == "__main__":
    main()
