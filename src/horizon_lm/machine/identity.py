"""What a run's record says about machine and source: processor, cores, memory, commit."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from horizon_lm.machine.cores import usable_cores
from horizon_lm.machine.memory import total_host_bytes


def machine() -> dict[str, Any]:
    """Return plain values for the first line of metrics.jsonl; none identifies the machine or its user."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "host_bytes": total_host_bytes(),
        "platform": platform.platform(),
    }


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture if the system does not tell."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


@cache
def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit of the running source, with `+` if files differ from it; None if unknown.

    Known in a checkout (`src/horizon_lm` below a `.git`), or if pip installed from git.
    """
    root = package.parents[1]
    if package.parent.name == "src" and (root / ".git").exists():
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head and head + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    try:
        source = json.loads(distribution("horizon-lm").read_text("direct_url.json") or "{}")
        return str(source["vcs_info"]["commit_id"])[:12]
    except (PackageNotFoundError, KeyError, TypeError, ValueError):
        return None


def _git(root: Path, *words: str) -> str | None:
    try:
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
