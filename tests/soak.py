"""Repeat the random tests with new seeds until the time is up: `python -m tests.soak [--minutes 30]`."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

FILES = [
    "tests/config/test_config.py",
    "tests/config/test_fuzzed.py",
    "tests/data/test_sources.py",
    "tests/data/test_packing.py",
    "tests/data/test_loader.py",
    "tests/schedule",
    "tests/memory/test_master.py",
    "tests/memory/test_store.py",
    "tests/ranks/test_alone.py",
    "tests/ranks/test_bits.py",
    "tests/ranks/test_orders.py",
    "tests/distributed/test_faults.py",
    "tests/engine/test_activations.py",
    "tests/engine/test_activation_memory.py",
    "tests/engine/test_cuda_lanes_logic.py",
    "tests/engine/test_lanes.py",
    "tests/engine/test_missing_waits.py",
    "tests/engine/test_failing_ops.py",
    "tests/engine/test_disk_lane.py",
    "tests/engine/test_rounds.py",
    "tests/engine/test_updates.py",
    "tests/plan/test_planner.py",
    "tests/model/test_hostile_folders.py",
    "tests/model/test_parameter_kinds.py",
    "tests/training/test_kills.py",
    "tests/training/test_adapters.py",
    "tests/checkpoint/test_merge.py",
    "tests/training/test_faults.py",
    "tests/training/test_resume.py",
    "tests/training/test_stops.py",
    "tests/host_model/test_interrupts.py",
    "tests/host_model/test_turns.py",
    "tests/checkpoint/test_checkpoint.py",
    "tests/checkpoint/test_failing_disks.py",
    "tests/checkpoint/test_damage.py",
    "tests/checkpoint/test_damaged_runs.py",
    "tests/optim/test_parity.py",
    "tests/project/test_documented.py",
    "tests/project/test_notebook.py",
    "tests/report/test_flops.py",
    "tests/trainers/test_grpo.py",
    "tests/ranks_run",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        seed = random.randrange(1 << 30)
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", *FILES]
        status = subprocess.run(command, check=False, env={**os.environ, "HORIZON_SOAK": "1"}).returncode
        if status:
            print(f"failed with seed {seed}: {' '.join(command)}")
            return status
        rounds += 1
    print(f"{rounds} rounds passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
