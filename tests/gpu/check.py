"""What needs a GPU to be shown. `make gpu-check`, or `python3 tests/gpu/check.py --part gradients`.

Exit code 0 when all passed (or there is no CUDA device, and it says so), 1 when something failed.

It needs torch, transformers and pydantic; `make gpu-wheels` gathers what a machine without a network
lacks (docs/benchmarking.md). `python3 -m horizon_lm.optim.kernel --build` builds the C++ optimizer,
without which it refuses to run on CUDA. With all parts it takes some minutes: --part splits it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# cuBLAS gives the same bits in each run only with a workspace of fixed size, set before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_TESTS = Path(__file__).resolve().parents[1]
for _path in (str(_TESTS), str(_TESTS / "helpers"), str(_TESTS.parent / "src")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

PARTS = ("gradients", "determinism", "lanes", "optimizer", "packed", "ranks", "sanitizer", "step")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="run this part alone (may be repeated)"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    parser.add_argument("--trace", type=Path, help="write the timeline of part `step` to this file")
    parser.add_argument("--repeats", type=int, default=20, help="steps of each run of part `lanes` (20)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="small and on the CPU: shows that the script runs, nothing of CUDA",
    )
    parser.add_argument("--model", action="append", help="only these of part `gradients` (may be repeated)")
    parser.add_argument("--sanitized-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    import torch

    if options.rank_child:
        from gpu.ranks import run_child

        run_child(options.rank_child)

    if options.sanitized_child:
        from gpu.sanitizer import run_sanitized

        run_sanitized()
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu-check: no CUDA device, nothing was run")
        if options.out:
            options.out.write_text(json.dumps({"ran": False, "reason": "no CUDA device"}, indent=2) + "\n")
        return 0
    from horizon_lm.optim import kernel

    if not options.dry_run and kernel.library() is None:
        print("gpu-check: the C++ optimizer is not built, and the torch reference proves nothing of it")
        print("  hint: python3 -m horizon_lm.optim.kernel --build")
        return 1
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    import torch

    from gpu.common import Part, Place

    place = Place(torch.device("cpu") if options.dry_run else torch.device("cuda", 0), options.dry_run)
    machine = _machine(place.device)
    print("gpu-check" + (" DRY RUN on the CPU: this shows nothing of CUDA" if place.dry else ""))
    print("  " + ", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    trace = options.trace
    if trace is None and options.out is not None:
        trace = options.out.with_name(options.out.stem + "-timeline.json")
    repeats = 2 if place.dry else options.repeats
    if place.dry:
        torch.set_num_threads(1)
    parts = []
    for name in options.part or PARTS:
        print(f"{name}:", flush=True)
        begin = time.perf_counter()
        try:
            part = _functions(place, repeats, trace, options.model)[name]()
        except Exception as error:  # a part that breaks must not keep the others from running
            traceback.print_exc()
            part = Part(name)
            part.add("ran to its end", False, f"{type(error).__name__}: {error}")
        part.seconds = time.perf_counter() - begin
        parts.append(part)
    for part in parts:
        failed = [row.name for row in part.rows if row.passed is False]
        compared = sum(row.passed is not None for row in part.rows)
        verdict = "passed" if part.passed else f"FAILED: {', '.join(failed)}"
        print(f"{part.name:<10} {compared - len(failed)} of {compared} in {part.seconds:.0f} s: {verdict}")
    passed = all(part.passed for part in parts)
    if options.out:
        result = {
            "ran": True,
            "dry_run": place.dry,
            "passed": passed,
            "machine": machine,
            "command": " ".join(sys.argv),
            "parts": [part.as_dict() for part in parts],
        }
        options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
        print(f"results: {options.out}")
    print(f"gpu-check: {'all passed' if passed else 'FAILED'}{' (dry run)' if place.dry else ''}")
    return 0 if passed else 1


def _functions(place, repeats: int, trace: Path | None, models: list[str] | None) -> dict[str, Callable]:
    from gpu.determinism import check_determinism
    from gpu.gradients import check_gradients
    from gpu.lanes import check_lanes
    from gpu.optimizer import check_optimizer
    from gpu.packed import check_packed
    from gpu.ranks import check_ranks
    from gpu.sanitizer import check_sanitizer
    from gpu.step import check_step

    return {
        "gradients": lambda: check_gradients(place, models),
        "determinism": lambda: check_determinism(place, repeats),
        "lanes": lambda: check_lanes(place, repeats),
        "optimizer": lambda: check_optimizer(place),
        "packed": lambda: check_packed(place),
        "ranks": lambda: check_ranks(place),
        "sanitizer": lambda: check_sanitizer(place),
        "step": lambda: check_step(place, trace),
    }


def _machine(device) -> dict[str, str]:
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
