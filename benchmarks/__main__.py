"""`python -m benchmarks [NAME ...]`: run the suite, or the named benchmarks with the options that follow."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

HELPERS = (
    "__main__",
    "report",
    "jobs",
    "peers",
    "remedies",
    "placement",
    "traced",
    "micro_layer",
    "micro_probe",
)
HELPERS += (
    "preference_runs",
    "rank_group",
    "rank_memory",
    "gpu_parts",
    "gpu_evidence",
    "gpu_runner",
    "gpu_tables",
    "gpu_goals",
    "wheels",
)
NAMES = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in HELPERS)


def main(argv: list[str] | None = None) -> int:
    """Split the arguments into names and, from the first word with a dash on, options."""
    argv = sys.argv[1:] if argv is None else argv
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, options = argv[:first], argv[first:]
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}\n  hint: there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    worst = 0
    for name in names or ["suite"]:
        print(f"== {name}", flush=True)
        worst = max(worst, importlib.import_module(f"benchmarks.{name}").main(options) or 0)
    return worst


if __name__ == "__main__":
    sys.exit(main())
