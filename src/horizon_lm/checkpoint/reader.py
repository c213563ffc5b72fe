"""Read checkpoints: into a store, with every check on the way, or only to verify them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn

from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import PIECE_BYTES, damaged
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.errors import CheckpointError
from horizon_lm.memory.store import HostStore


def load_units(checkpoint: Checkpoint, store: HostStore) -> None:
    """Fill the store. Raises CheckpointError for a file that is damaged or does not fit the model; the store
    is unusable then."""
    wanted = {units.file_name(u) for u, unit in enumerate(store.units) if unit.numel}
    listed = {name for name in checkpoint.manifest.files if name.startswith("unit-")}
    for name in sorted(wanted ^ listed):
        what = "is not part of the checkpoint" if name in wanted else "belongs to no unit of this model"
        raise damaged(checkpoint.path / name, what)
    for number, unit in enumerate(store.units):
        if not unit.numel:
            continue
        name = units.file_name(number)
        with _opened(checkpoint.path / name) as file:
            found = units.read(file, units.entries(store, number), str(checkpoint.path / name))
        if found != checkpoint.manifest.files[name][1]:
            raise corrupt(checkpoint.path / name)


def load_buffers(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Fill the persistent buffers of `module`. Raises CheckpointError."""
    read_small(checkpoint, units.BUFFERS)  # checks it
    path = checkpoint.path / units.BUFFERS
    rows = units.copied_buffers(module)
    with open(path, "rb") as file:
        units.read(file.fileno(), rows, str(path))
    for (name, value), (_, buffer) in zip(rows, units.persistent_buffers(module), strict=True):
        assert value.shape == buffer.shape, name
        buffer.copy_(value)


def read_small(checkpoint: Checkpoint, name: str) -> bytes:
    """Read and check one of the small files. Raises CheckpointError."""
    if name not in checkpoint.manifest.files:
        raise damaged(checkpoint.path / name, "is not part of the checkpoint")
    path = checkpoint.path / name
    with _opened(path) as file:
        data = b"".join(iter(lambda: os.read(file, PIECE_BYTES), b""))
    if xxhash.xxh3_128_hexdigest(data) != checkpoint.manifest.files[name][1]:
        raise corrupt(path)
    return data


@dataclass(frozen=True)
class Verdict:
    """Findings of `verify`. faults: one sentence each; empty if the checkpoint is sound."""

    num_files: int
    num_tensors: int
    num_bytes: int
    faults: tuple[str, ...]


def verify(checkpoint: Checkpoint, say: Callable[[str], None] = lambda text: None) -> Verdict:
    """Check checksums, headers and finiteness of numbers; report every fault, not only the first."""
    faults: list[str] = []
    num_tensors = 0
    for name, (_, digest) in checkpoint.manifest.files.items():
        path = checkpoint.path / name
        say(name)
        try:
            if file_checksum(path) != digest:
                raise corrupt(path)
            if name.endswith(".safetensors"):
                count, strange = _look_at_tensors(path)
                num_tensors += count
                faults += strange
        except CheckpointError as error:
            faults.append(error.message)
    extra = sorted(_names(checkpoint.path) - checkpoint.manifest.files.keys() - {"manifest.json"})
    faults += [f"{checkpoint.path / name}: is not listed in the manifest" for name in extra]
    total = checkpoint.manifest
    return Verdict(len(total.files), num_tensors, total.num_bytes, tuple(faults))


def file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with _opened(path) as file:
        while piece := os.read(file, PIECE_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())


def _look_at_tensors(path: Path) -> tuple[int, list[str]]:
    """Return (number of tensors, faults). The checksum has been checked, so the size is right."""
    faults = []
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for key in keys:
                tensor = file.get_tensor(key)
                if tensor.is_floating_point():
                    pieces = tensor.flatten().split(1 << 22)
                    bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
                    if bad:
                        faults.append(f"{path}: {key} has {bad:,} values that are not finite")
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise damaged(path, str(error)) from None
    return len(keys), faults


def _names(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in found}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file of a checkpoint; never through a link, never a device. OSErrors become CheckpointErrors."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(path, f"cannot be opened: {error.strerror}") from None
    try:
        yield file
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(file)


def corrupt(path: Path) -> CheckpointError:
    return damaged(path, "corrupt (checksum mismatch)")
