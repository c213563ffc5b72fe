"""Stores of any number of ranks with the same content, and checkpoints that they write and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import zoo
from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Checkpoint, Retention, list_checkpoints
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.reader import load_units
from horizon_lm.checkpoint.writer import CheckpointWriter, Outcome, Snapshot
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.host_model import HostModel
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.memory.shards import WHOLE, Shard
from horizon_lm.memory.store import HostStore
from sharded_stores import BF16, FP32, layouts
from threaded_ranks import on_ranks

SMALL = {"config.json": b"{}", "tokenizer.json": b"[]", "templates/chat.jinja": b"x"}
KINDS = ("fp32", "bf16", "one moment", "tied", "frozen", "wide", "experts")


class SmallBlocks(Disk):
    """Many blocks of few bytes, and many writes."""

    buffer_bytes = block_bytes = 4096


def content(kind: str) -> HostStore:
    """A store of one rank with random bits, of finite numbers, in all that is saved."""
    spec = {
        "fp32": StoreSpec(FP32),
        "bf16": StoreSpec(BF16, moment_dtype=BF16),
        "one moment": StoreSpec(BF16, second_moment=False),
    }.get(kind)
    if spec is not None:
        return _with_random_bits(HostStore(layouts(spec.dtype), spec))
    name, more = {
        "tied": ("gpt2", {}),
        "frozen": ("llama", {"freeze": ["embed_tokens", "layers.1.", "mlp"]}),
        "wide": ("deepseek_v3", {}),
        "experts": ("mixtral", {}),
    }[kind]
    source = zoo.build(name, torch.float32)
    model = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16", skip_memory_check=True, **more)
    return _with_random_bits(model.store)


def _with_random_bits(store: HostStore) -> HostStore:
    draw = torch.Generator().manual_seed(0)
    for unit in range(len(store.units)):
        for _, view in units.entries(store, unit):
            bits = torch.randint(0, 256, (view.nbytes,), generator=draw, dtype=torch.uint8)
            if view.is_floating_point():  # finite: without the highest bit of the exponent
                bits[view.itemsize - 1 :: view.itemsize] &= 0xBF
            view.reshape(-1).view(torch.uint8).copy_(bits)
    return store


def empty(whole: HostStore, shard: Shard) -> HostStore:
    return HostStore(whole.units, replace(whole.spec, shard=shard))


def share(whole: HostStore, shard: Shard) -> HostStore:
    """The store of one of several ranks."""
    found = empty(whole, shard)
    for unit in range(len(whole.units)):
        everything = dict(units.entries(whole, unit))
        parts = units.parts(found.units[unit], found.spec, shard)
        for (part, _), (key, view) in zip(parts, units.entries(found, unit), strict=True):
            view.reshape(-1).copy_(everything[key].reshape(-1)[part.start : part.stop])
    return found


def bits(stores: Sequence[HostStore]) -> dict[str, bytes]:
    """All that is saved, of all ranks together: key -> bytes."""
    found: dict[str, bytearray] = {}
    for store in stores:
        for unit in range(len(store.units)):
            parts = units.parts(store.units[unit], store.spec, store.spec.shard)
            for (part, _), (key, view) in zip(parts, units.entries(store, unit), strict=True):
                size = part.dtype.itemsize
                whole = found.setdefault(key, bytearray(size * torch.Size(part.shape).numel()))
                whole[part.start * size : part.stop * size] = bytes(units.as_bytes(view))
    return {key: bytes(value) for key, value in found.items()}


def writer_of(
    run: Path,
    store: HostStore,
    step: int,
    ranks: Ranks = ALONE,
    disk: Disk | None = None,
    keep: Retention | None = None,
) -> CheckpointWriter:
    found, _ = list_checkpoints(run)
    serial = 1 + max((c.manifest.serial for c in found), default=0)
    manifest = Manifest(step, serial, {}, config={"seed": 42}, state={"steps_done": step})
    buffers = [("a.buffer", torch.arange(10.0))]
    snapshot = Snapshot(manifest, store, buffers, SMALL)
    return CheckpointWriter(run, snapshot, disk or SmallBlocks(), keep, ranks=ranks)


def write(writer: CheckpointWriter, num_units: int) -> Outcome:
    for unit in range(num_units):
        writer.write_unit(unit)
    writer.finish()
    assert writer.outcome is not None
    return writer.outcome


def save(
    run: Path,
    whole: HostStore,
    world: int,
    step: int = 1,
    *,
    disks: Mapping[int, Disk] | None = None,
    keep: Retention | None = None,
    on: Callable[[int, CheckpointWriter], None] = lambda rank, writer: None,
) -> list[Outcome]:
    """Write a checkpoint with `world` ranks, each a thread; return the outcome on each.

    disks: of some ranks. on: is called with each writer before anything is written.
    """
    number = len(whole.units)

    def work(ranks: Ranks) -> Outcome:
        store = share(whole, Shard(ranks.rank, ranks.world))
        disk = (disks or {}).get(ranks.rank)
        writer = writer_of(run, store, step, ranks, disk, keep)
        on(ranks.rank, writer)
        return write(writer, number)

    if world == 1:
        return [write(writer_of(run, whole, step, disk=(disks or {}).get(0), keep=keep), number)]
    return on_ranks(world, work)


def load(checkpoint: Checkpoint, whole: HostStore, world: int) -> list[HostStore]:
    """Read a checkpoint into the stores of `world` ranks."""
    shards = [Shard(rank, world) for rank in range(world)] if world > 1 else [WHOLE]
    stores = [empty(whole, shard) for shard in shards]
    for store in stores:
        load_units(checkpoint, store)
    return stores
