"""Units of all kinds of parts, and stores of them that one rank or several hold, of the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from horizon_lm.memory.layout import UnitLayout, lay_out
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.memory.shards import WHOLE, Shard
from horizon_lm.memory.store import HostStore

BF16, FP32 = torch.bfloat16, torch.float32
WORLDS = (1, 2, 3, 4, 64)
REGIONS = ("weights", "residual", "exp_avg", "exp_avg_sq", "grads")
CPU = torch.device("cpu")


def unit(name: str, dtype: torch.dtype, **shapes: tuple[int, ...]) -> UnitLayout:
    """A unit of parameters whose names begin with f (frozen) or t (trainable); w after that: wide."""
    rows = [
        (f"{name}.{key}", shape, key[0] == "t", FP32 if key[1:2] == "w" else dtype)
        for key, shape in shapes.items()
    ]
    return lay_out(name, rows, dtype)


def layouts(dtype: torch.dtype) -> list[UnitLayout]:
    """Prologue, four layers, head, and a table: shares that fall into each part, and across parameters."""
    return [
        unit("prologue", dtype),
        unit("all", dtype, f1=(97, 51), fw=(5000,), tw=(4500,), t1=(40, 33), t2=(130, 129), f2=(3,)),
        unit("trained", dtype, t1=(64, 128), t2=(7,), t3=(2, 3, 5), tw=(9,)),
        unit("frozen", dtype, f1=(4096,), f2=(1,), fw=(4097,)),
        unit("wide", dtype, tw1=(9000,), tw2=(3000,), t1=(17,), fw1=(1,), fw2=(8300,)),
        unit("head", dtype, t1=(99, 130), f1=(12000,)),
        unit("table", dtype, t=(99, 130)),
    ]


def filled(spec: StoreSpec, shard: Shard = WHOLE, device: torch.device = CPU) -> HostStore:
    """A store of `layouts` as a rank fills it: masters adopted, other regions with shares of whole values."""
    store = HostStore(layouts(spec.dtype), replace(spec, shard=shard), pin_for=device, device=device)
    draw = torch.Generator().manual_seed(0)
    for name in store.names():
        number, parameter = store.locate(name)
        store.adopt(name, torch.randn(parameter.shape, generator=draw))
        for region in ("exp_avg", "exp_avg_sq", "grads") if parameter.trainable else ():
            value = torch.randn(parameter.shape, generator=draw).abs() * 1e-2
            piece = store.shards[number].trainable_piece(parameter)
            if store.has(region) and piece is not None:
                place = store.run(region, number)[piece.offset : piece.offset + piece.numel]
                place.copy_(value.view(-1)[piece.start : piece.stop])
    return store


def gathered(stores: Sequence[HostStore], region: str, number: int) -> torch.Tensor:
    """A unit's whole run in a region, from the stores of all ranks."""
    parts = [(store, piece) for store in stores for piece in store.shards[number].pieces(region)]
    found = stores[0].run(region, number).new_zeros(max((p.stop for _, p in parts), default=0))
    for store, (start, stop, offset) in parts:
        found[start:stop] = store.run(region, number)[offset : offset + stop - start]
    return found


def padding(store: HostStore, region: str, number: int) -> torch.Tensor:
    """The elements of a rank's run that are none of the unit's."""
    is_held = torch.zeros(store.run(region, number).numel(), dtype=torch.bool)
    for start, stop, offset in store.shards[number].pieces(region):
        is_held[offset : offset + stop - start] = True
    return store.run(region, number)[~is_held]
