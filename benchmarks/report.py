"""Dated result files: commands, commit and machine, and tables."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """Return the short hash of HEAD, marked if the working tree has changes; without git, of the sources."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"sources {sources()}"
    return head + (f" with changes (sources {sources()})" if changed else "")


def sources() -> str:
    """Return a hash of the measuring and the measured code."""
    root, found = Path(__file__).parent.parent, hashlib.sha256()
    for folder in ("src", "csrc", "benchmarks", "tests/gpu"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".yaml", ".jinja"):
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def versions(names: tuple[str, ...] = ("transformers", "accelerate", "deepspeed", "torchao")) -> str:
    """Return the versions of relevant packages; absent ones say so."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def command_line() -> str:
    """Return this process's command, without paths."""
    place = Path(sys.argv[0])
    module = "benchmarks" if place.stem == "__main__" else f"benchmarks.{place.stem}"
    return " ".join(["python -m", module, *sys.argv[1:]])


class Report:
    """Collects tables and writes `results/DATE-NAME.md`.

    command: by default that of this process. machine: by default `machine()`, as of now.
    """

    def __init__(
        self, name: str, about: str, *, command: str | None = None, machine: str | None = None
    ) -> None:
        self.name = name
        first = f"Command: `{command or command_line()}`"
        self.parts = [f"# {name}", about.strip(), first, machine or self.machine()]

    @staticmethod
    def machine() -> str:
        """Describe date, commit, machine and software."""
        load = os.getloadavg()[0]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the GPU part has not run"
        return (
            f"- date: {datetime.date.today()}, commit {commit()}\n"
            f"- CPU: {cpu_name()}, {os.cpu_count()} cores, load at start {load:.1f}; GPU: {gpu}\n"
            f"- Python {platform.python_version()}, torch {torch.__version__}, {versions()}"
        )

    def table(self, head: list[str], rows: list[list[str]], *, note: str = "") -> None:
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.parts.append("\n".join(lines))
        if note:
            self.parts.append(note)

    def section(self, title: str, text: str = "") -> None:
        self.parts.append(f"## {title}" + (f"\n\n{text}" if text else ""))

    def write(self, folder: Path | None = None) -> Path:
        """Write the file. folder: `results` by default."""
        folder = folder or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datetime.date.today()}-{self.name}.md"
        path.write_text("\n\n".join(self.parts) + "\n")
        print(f"written: {path.parent.name}/{path.name}")
        return path
