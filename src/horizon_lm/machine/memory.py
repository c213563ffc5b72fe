"""Host memory that this process may take, and lock."""

from __future__ import annotations

from pathlib import Path

import psutil

from horizon_lm.machine import cgroup

_NO_LIMIT = 1 << 60


def available_host_bytes(stated: int | None = None, *, sharers: int = 1) -> int:
    """Return the least of free RAM, the headroom of every cgroup above this process, and its own limits.

    stated: the machine's RAM, counted as free except for what this process holds. By default free RAM is what
    the system reports (MemAvailable), which some virtual machines raise only as memory is used. sharers:
    processes that share RAM and cgroups equally (`Ranks.local_world`); all ask before any takes its share.
    """
    shared = [psutil.virtual_memory().available // sharers]
    if stated is not None:
        shared = [stated // sharers - psutil.Process().memory_info().rss]
    shared += [headroom // sharers for headroom in _cgroup_headrooms()]
    return max(0, min([*shared, *_process_limits()]))


def total_host_bytes() -> int:
    """Return the RAM that the system reports (MemTotal)."""
    return psutil.virtual_memory().total


def _cgroup_headrooms(root: Path = cgroup.ROOT, listing: Path = cgroup.LISTING) -> list[int]:
    """What each group with a limit may still take: v2 `memory.max`, v1 `memory.limit_in_bytes`."""
    names = {
        True: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        False: ("memory.max", "memory.current"),
    }
    found = [_headroom(folder, *names[v1]) for folder, v1 in cgroup.levels("memory", root, listing)]
    return [headroom for headroom in found if headroom is not None]


def _headroom(folder: Path, limit_name: str, usage_name: str) -> int | None:
    """What a group may still take; None if it has no limit (2**60 bytes or more mean none)."""
    limit = cgroup.read(folder / limit_name).strip()
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    usage = cgroup.read(folder / usage_name).strip()
    return int(limit) - int(usage if usage.isdigit() else 0) + _inactive_file(folder / "memory.stat")


def _inactive_file(stat: Path) -> int:
    """File cache, which the kernel reclaims before it kills anything. Usage counts a group's children in v1,
    and of its two figures only the total does."""
    rows = dict(line.partition(" ")[::2] for line in cgroup.read(stat).splitlines())
    value = rows.get("total_inactive_file", rows.get("inactive_file", ""))
    return int(value) if value.isdigit() else 0


def _process_limits() -> list[int]:
    """Headroom below `ulimit -v` (address space) and `ulimit -d` (private writable memory)."""
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    memory = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: memory.vms, resource.RLIMIT_DATA: getattr(memory, "data", memory.vms)}
    soft = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [soft[kind] - used[kind] for kind in used if soft[kind] != resource.RLIM_INFINITY]


def lockable_bytes() -> int | None:
    """Return `ulimit -l`, the bytes that this process may lock; None without a limit."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
