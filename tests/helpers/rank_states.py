"""Checkpoints and models on disk, written by any number of ranks, as one rank would hold them."""

from __future__ import annotations

from pathlib import Path


def exported(folder: Path) -> dict[str, bytes]:
    """Every file of a model's folder but the card, which has the time."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "README.md"}
