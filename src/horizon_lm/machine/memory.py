"""What this machine has: host memory that this process may take."""

from __future__ import annotations

from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60


def available_host_bytes() -> int:
    """Host memory this process can still take: the least of free RAM, cgroup headroom and its own limits.

    psutil knows nothing of cgroups, hence the walk up the tree (v2 `memory.max`, v1
    `memory.limit_in_bytes`; a limit of 2**60 or more means none).
    """
    candidates = [psutil.virtual_memory().available, *_cgroup_headrooms(), *_process_limits()]
    return max(0, min(candidates))


def _cgroup_headrooms(
    root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")
) -> list[int]:
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not path or (controllers and "memory" not in controllers.split(",")):
            continue
        base = root / "memory" if controllers else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        folder = base / path.strip("/")
        for level in [folder, *folder.parents]:
            headroom = _headroom(level, *names)
            if headroom is not None:
                found.append(headroom)
            if level == base:
                break
    return found


def _headroom(folder: Path, limit_name: str, usage_name: str) -> int | None:
    """What a group may still take; None when it has no limit."""
    limit = _read(folder / limit_name).strip()
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    usage = _read(folder / usage_name).strip()
    return int(limit) - int(usage if usage.isdigit() else 0) + _inactive_file(folder / "memory.stat")


def _inactive_file(stat: Path) -> int:
    """File cache that the kernel gives back before it kills anything. In v1 the usage counts the
    group's children, and of the two figures only the total does."""
    rows = dict(line.partition(" ")[::2] for line in _read(stat).splitlines())
    value = rows.get("total_inactive_file", rows.get("inactive_file", ""))
    return int(value) if value.isdigit() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _process_limits() -> list[int]:
    """Headroom under `ulimit -v` (address space) and `ulimit -d` (private writable memory)."""
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    memory = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: memory.vms, resource.RLIMIT_DATA: getattr(memory, "data", memory.vms)}
    soft = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [soft[kind] - used[kind] for kind in used if soft[kind] != resource.RLIM_INFINITY]


def lockable_bytes() -> int | None:
    """`ulimit -l`, the memory that this process may lock, in bytes; None without a limit."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
