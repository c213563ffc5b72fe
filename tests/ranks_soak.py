"""Faults of runs on several ranks, every case of the matrix: `python -m tests.ranks_soak [--only TEXT]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from rank_matrix import Matrix, cases
from rank_server import RankServer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in case.name]
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    longest = 0.0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, RankServer() as server:
        matrix = Matrix(server, Path(place))
        for number, case in enumerate(chosen):
            try:
                seconds = matrix.check(case, Path(place) / f"run-{number}")
            except Exception:
                failed[case.kind] += 1
                print(f"FAILED  {case.name}\n{traceback.format_exc()}", flush=True)
                continue
            passed[case.kind] += 1
            longest = max(longest, seconds)
            print(f"{seconds:5.1f} s  {case.name}", flush=True)
    print(f"\n{'fault':12}{'cases':>8}{'failed':>8}")
    for kind in dict.fromkeys(case.kind for case in chosen):
        print(f"{kind:12}{passed[kind] + failed[kind]:8}{failed[kind]:8}")
    seconds = time.monotonic() - began
    print(f"{'all':12}{len(chosen):8}{failed.total():8}")
    print(f"all ranks had ended after at most {longest:.1f} s; {seconds:.0f} s in all")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
