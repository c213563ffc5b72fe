"""Cores that this process may use, by its affinity and its cgroup quotas.

The kernel gets this number with every call, so torch's own pool and OMP_NUM_THREADS do not matter.
"""

from __future__ import annotations

import os
from pathlib import Path

from horizon_lm.machine import cgroup


def usable_cores(root: Path = cgroup.ROOT, listing: Path = cgroup.LISTING, *, sharers: int = 1) -> int:
    """Return the least of the process's affinity and every cgroup quota above it; at least 1.

    A quota of 2.5 cores counts as 2: the kernel would stop threads beyond it one by one, and all wait for the
    last. sharers: processes that share these cores equally (`Ranks.core_sharers`).
    """
    cores = min([len(affinity()), *(int(quota) for quota in _cgroup_quotas(root, listing))])
    return max(1, cores // sharers)


def affinity() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def lane_cores(device: str, update: str) -> int:
    """Return how many cores updates leave to the threads that issue uploads, compute and downloads.

    device: device type. update: `sync` runs between steps, when these threads are idle.
    """
    return 0 if device == "cpu" or update == "sync" else 3


def choose_threads(requested: int | None = None, *, spare: int = 0, sharers: int = 1, **places: Path) -> int:
    """Limit `requested` threads to the usable cores. None: all usable cores less `spare`, at least one."""
    usable = usable_cores(**places, sharers=sharers)
    if requested is None:
        return max(1, usable - spare)
    if requested < 1:
        raise ValueError(f"{requested} optimizer threads; hint: 1 or more")
    return min(requested, usable)


def spin_briefly() -> None:
    """Have OpenMP's threads, of torch and of the optimizer kernel, go to sleep sooner when they wait.

    With GCC's OpenMP a waiting thread spins 300,000 times. Beside other programs it so keeps a core from the
    thread it waits for, and steps take up to several times as long. 10,000 cost nothing on a quiet machine
    (benchmarks/results/2026-11-30-busy-machine-cpu.md). OpenMP reads the variable once, when `import torch`
    loads it, so call this first. A policy that the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _cgroup_quotas(root: Path, listing: Path) -> list[float]:
    """Cores that this process's groups and their parents allow: v2 `cpu.max`, v1 `cpu.cfs_quota_us`."""
    found = [_quota(folder, v1) for folder, v1 in cgroup.levels("cpu", root, listing)]
    return [quota for quota in found if quota is not None]


def _quota(folder: Path, v1: bool) -> float | None:
    if v1:
        words = [cgroup.read(folder / "cpu.cfs_quota_us"), cgroup.read(folder / "cpu.cfs_period_us")]
    else:
        words = cgroup.read(folder / "cpu.max").split()
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # no such file, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None  # v1 says -1 for no limit
