"""The control groups of this process: their folders, and what a file in them says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, LISTING = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def levels(controller: str, root: Path = ROOT, listing: Path = LISTING) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, whether it is of version 1) for each group that limits a `controller`, parents included.

    A folder need not exist: in a container without a namespace of its own the listing names the host's path.
    """
    for line in read(listing).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not path or (controllers and controller not in controllers.split(",")):
            continue
        bases = [root / controllers, root / controller] if controllers else [root, root / "unified"]
        for base in dict.fromkeys(bases):
            folder = base / path.strip("/")
            for level in [folder, *folder.parents]:
                yield level, bool(controllers)
                if level == base:
                    break


def read(path: Path) -> str:
    """Return a file's text; empty if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
