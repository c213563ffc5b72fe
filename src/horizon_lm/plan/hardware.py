"""What this machine has: host memory that this process may take."""

from __future__ import annotations

from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60


def available_host_bytes() -> int:
    """Host memory this process can still take: the least of free RAM, cgroup headroom and RLIMIT_AS.

    psutil knows nothing of cgroups, hence the walk up the tree (v2 `memory.max`, v1
    `memory.limit_in_bytes`; a limit of 2**60 or more means none).
    """
    candidates = [psutil.virtual_memory().available, *_cgroup_headrooms(), *_address_space()]
    return max(0, min(candidates))


def _cgroup_headrooms(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> list[int]:
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = base / path.strip("/")
        for level in [folder, *folder.parents]:
            headroom = _headroom(level, *names)
            if headroom is not None:
                found.append(headroom)
            if level == base:
                break
    return found


def _headroom(folder: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
        cache = _inactive_file(folder / "memory.stat")
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    return int(limit) - usage + cache


def _inactive_file(stat: Path) -> int:
    """File cache that the kernel gives back before it kills anything."""
    for line in stat.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _address_space() -> list[int]:
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    return [soft - psutil.Process().memory_info().vms]
