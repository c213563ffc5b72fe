"""How many threads this process may keep busy: its affinity and its share by cgroup, not the machine's cores.

The kernel is told this number with every call, so torch's own pool and OMP_NUM_THREADS do not enter.
"""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: the least of its affinity and every cgroup quota above it; at least 1.

    A quota of 2.5 cores counts as 2: threads beyond it would be stopped in turn, and all wait for the last.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cgroup_quotas(root, listing))]))


def choose_threads(requested: int | None = None, **places: Path) -> int:
    """`requested` threads (None: as many as there are usable cores), never more than the usable cores."""
    usable = usable_cores(**places)
    if requested is None:
        return usable
    if requested < 1:
        raise ValueError(f"{requested} optimizer threads; hint: 1 or more")
    return min(requested, usable)


def _cgroup_quotas(root: Path, listing: Path) -> list[float]:
    """Cores allowed by this process's groups and their parents: v2 `cpu.max`, v1 `cpu.cfs_quota_us`."""
    found = []
    for line in _read(listing).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not path or (controllers and "cpu" not in controllers.split(",")):
            continue
        bases = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        for base in bases:
            folder = base / path.strip("/")
            for level in [folder, *folder.parents]:
                found.append(_quota(level, v1=bool(controllers)))
                if level == base:
                    break
    return [quota for quota in found if quota is not None]


def _quota(folder: Path, v1: bool) -> float | None:
    if v1:
        words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    else:
        words = _read(folder / "cpu.max").split()
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # no such file, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None  # v1 says -1 for no limit


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
