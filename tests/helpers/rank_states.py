"""Checkpoints and models on disk, written by any number of ranks, as one rank would hold them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

State = dict[str, tuple[list[int], bytes]]


def exported(folder: Path) -> dict[str, bytes]:
    """Every file of a model's folder but the card, which has the time."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "README.md"}


def logical_state(checkpoint: Path) -> State:
    """Return (shape, bytes) of each tensor; every element of it must have been written exactly once."""
    found: State = {}
    ranks = sorted(checkpoint.glob("rank-*"))
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, value in _tensors(path).items():
            assert key not in found
            found[key] = value
    pieces: dict[str, list[tuple[int, int, list[int], bytes]]] = {}
    for folder in ranks:
        index = json.loads((folder / "index.json").read_text())["files"]
        for name, listed in index.items():
            tensors = _tensors(folder / name)
            for piece in listed["pieces"]:
                place = piece["start"], piece["stop"], piece["shape"], tensors.pop(piece["key"])[1]
                pieces.setdefault(piece["key"], []).append(place)
            assert not tensors, (folder, name)
    for key, parts in pieces.items():
        parts.sort()
        shape = parts[0][2]
        if prod(shape):
            assert [start for start, *_ in parts] == [0, *(stop for _, stop, *_ in parts[:-1])], key
        assert parts[-1][1] == prod(shape), key
        assert key not in found
        found[key] = shape, b"".join(content for *_, content in parts)
    return found


def _tensors(path: Path) -> State:
    """Read a file of safetensors without its dtypes: numpy lacks bf16."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    return {
        key: (entry["shape"], content[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]])
        for key, entry in header.items()
        if key != "__metadata__"
    }
