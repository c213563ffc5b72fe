"""Read checkpoints: into a store, with every check on the way, or only to verify them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn

from horizon_lm.checkpoint import index, units
from horizon_lm.checkpoint.disk import PIECE_BYTES, damaged
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.manifest import INDEX, rank_folder
from horizon_lm.checkpoint.sources import (
    Check,
    Source,
    Wanted,
    corrupt,
    difference,
    fill,
    opened,
    whole_tensors,
)
from horizon_lm.checkpoint.units import DTYPE_NAMES, Part
from horizon_lm.errors import CheckpointError
from horizon_lm.memory.shards import WHOLE
from horizon_lm.memory.store import HostStore, saved_in

# Into a store.


def load_units(checkpoint: Checkpoint, store: HostStore) -> None:
    """Fill the store with what it holds of a checkpoint that any number of ranks has written.

    Raises CheckpointError for a file that is damaged or does not fit the model; the store is unusable then.
    A rank reads, and verifies, only what it holds: whether all ranks succeeded they must tell each other.
    """
    by_unit = _by_many if checkpoint.manifest.ranks > 1 else _by_one
    for unit, sources in by_unit(checkpoint, store).items():
        parts = units.parts(store.units[unit], store.spec, store.spec.shard)
        views = (view.reshape(-1) for _, view in units.entries(store, unit))
        wanted = {part.key: Wanted(part.start, view) for (part, _), view in zip(parts, views, strict=True)}
        for source in sources:
            fill(source, wanted)


def _by_one(checkpoint: Checkpoint, store: HostStore) -> dict[int, list[Source]]:
    """Return the file of each unit, which has whole tensors."""
    files = checkpoint.manifest.files
    wanted = {units.file_name(u): u for u in _saved_units(store)}
    listed = {name for name in files if name.startswith("unit-")}
    for name in sorted(wanted.keys() ^ listed):
        what = "is not part of the checkpoint" if name in wanted else "belongs to no unit of this model"
        raise damaged(checkpoint.path / name, what)
    return {
        unit: [_whole_source(checkpoint.path / name, _expected(store, unit), files[name][1])]
        for name, unit in wanted.items()
    }


def _by_many(checkpoint: Checkpoint, store: HostStore) -> dict[int, list[Source]]:
    """Return the files of each unit, after a check that they have all of it between them."""
    found = sources_of_ranks(checkpoint)
    wanted = set(_saved_units(store))
    for unit in sorted(wanted ^ found.keys()):
        what = "is in no file" if unit in wanted else "belongs to no unit of this model"
        raise damaged(checkpoint.path, f"{units.file_name(unit)} {what}")
    for unit, sources in found.items():
        have = whole_tensors(checkpoint.path, sources).values()
        problem = difference(_described(have), _described(_expected(store, unit)))
        if problem is not None:
            raise damaged(checkpoint.path, f"{units.file_name(unit)} {problem}")
    return found


def _saved_units(store: HostStore) -> list[int]:
    """Return the units that have a file."""
    return [u for u, unit in enumerate(store.units) if any(saved_in("weights", unit, store.spec))]


def _expected(store: HostStore, unit: int) -> list[Part]:
    """Return the whole tensors of a unit, in the order of the file."""
    return [part for part, _ in units.parts(store.units[unit], store.spec, WHOLE)]


def _described(parts: Iterable[Part]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {part.key: (DTYPE_NAMES[part.dtype], part.shape) for part in parts}


def _whole_source(path: Path, parts: Iterable[Part], digest: str) -> Source:
    source = Source(path, tuple(parts), False, ())
    return Source(path, source.parts, False, (Check(0, source.num_bytes, digest),))


def sources_of_ranks(checkpoint: Checkpoint) -> dict[int, list[Source]]:
    """Return the files of each unit of a checkpoint of many ranks, by their indexes.

    Raises CheckpointError for a damaged index. Whether the files have all elements is not checked.
    """
    found: dict[int, list[Source]] = defaultdict(list)
    for rank in range(checkpoint.manifest.ranks):
        for name, source in sources_of_rank(checkpoint, rank).items():
            found[units.unit_number(Path(name).name)].append(source)
    return dict(sorted(found.items()))


def sources_of_rank(checkpoint: Checkpoint, rank: int) -> dict[str, Source]:
    """Return the files of units that a rank has written, by their names in the manifest."""
    folder, files = rank_folder(rank), checkpoint.manifest.files
    place = f"{folder}/{INDEX}"
    sizes = {
        name.removeprefix(f"{folder}/"): num_bytes
        for name, (num_bytes, _) in files.items()
        if name.startswith(f"{folder}/") and name != place
    }
    block, listed = index.parse(read_small(checkpoint, place), str(checkpoint.path / place), sizes)
    return {
        f"{folder}/{name}": Source(
            checkpoint.path / folder / name,
            tuple(file.parts),
            True,
            tuple(
                Check(number * block, min((number + 1) * block, sizes[name]), digest)
                for number, digest in enumerate(file.blocks)
            ),
        )
        for name, file in listed.items()
    }


def load_buffers(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Fill the persistent buffers of `module`. Raises CheckpointError."""
    read_small(checkpoint, units.BUFFERS)  # checks it
    rows = units.copied_buffers(module)
    parts = [Part(name, value.dtype, tuple(value.shape), 0, value.numel()) for name, value in rows]
    digest = checkpoint.manifest.files[units.BUFFERS][1]
    wanted = {name: Wanted(0, value.view(-1)) for name, value in rows}
    fill(_whole_source(checkpoint.path / units.BUFFERS, parts, digest), wanted)
    for (name, value), (_, buffer) in zip(rows, units.persistent_buffers(module), strict=True):
        assert value.shape == buffer.shape, name
        buffer.copy_(value)


# Of files.


def read_small(checkpoint: Checkpoint, name: str) -> bytes:
    """Read and check one of the small files. Raises CheckpointError."""
    if name not in checkpoint.manifest.files:
        raise damaged(checkpoint.path / name, "is not part of the checkpoint")
    path = checkpoint.path / name
    with opened(path) as file:
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
    """Check checksums, headers, finiteness of numbers, and that many ranks have each element once.

    Reports every fault, not only the first.
    """
    sources, faults = _indexed(checkpoint)
    num_tensors = 0
    for name, (_, digest) in checkpoint.manifest.files.items():
        path = checkpoint.path / name
        say(name)
        try:
            if file_checksum(path, sources.get(name)) != digest:
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


def _indexed(checkpoint: Checkpoint) -> tuple[dict[str, Source], list[str]]:
    """Return the files of ranks by name, and what is wrong with their indexes."""
    found: dict[str, Source] = {}
    faults: list[str] = []
    if checkpoint.manifest.ranks == 1:
        return found, faults
    by_unit: dict[str, list[Source]] = defaultdict(list)
    try:
        for rank in range(checkpoint.manifest.ranks):
            for name, source in sources_of_rank(checkpoint, rank).items():
                found[name] = source
                by_unit[source.path.name].append(source)
    except CheckpointError as error:
        return found, [error.message]
    for sources in by_unit.values():
        try:
            whole_tensors(checkpoint.path, sources)
        except CheckpointError as error:
            faults.append(error.message)
    return found, faults


def file_checksum(path: Path, source: Source | None = None) -> str:
    """Return the xxh3-128 of a file. source: raise CheckpointError unless the file is as its index says."""
    digest = xxhash.xxh3_128()
    if source is not None:
        fill(source, {}, everything=True, digest=digest)
        return str(digest.hexdigest())
    with opened(path) as file:
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
