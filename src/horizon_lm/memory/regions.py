"""Regions of a store: what it holds per parameter, and where (the table is in memory/store.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.packed import packed_bytes
from horizon_lm.memory.shards import WHOLE, Shard, UnitShard

_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class GradientSlabs:
    """Host buffers for the gradients of eager updates: `count` for layers and prologue, round-robin, and one
    shared by the units `outer` (head and embedding table). Resident units have none."""

    count: int
    outer: frozenset[int]

    def numels(
        self, units: Sequence[UnitLayout], resident: frozenset[int] = _NONE, shard: Shard = WHOLE
    ) -> list[int]:
        """Elements of each slab, the shared one last."""
        streamed = [
            (u, shard.share(unit.trainable_numel)) for u, unit in enumerate(units) if u not in resident
        ]
        inner = max((numel for u, numel in streamed if u not in self.outer), default=0)
        outer = max((numel for u, numel in streamed if u in self.outer), default=0)
        return [inner] * self.count + [outer]


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds per parameter, and where.

    dtype: weight and gradient dtype, bf16 or fp32. resident: units that live in device memory; of those in
    `split`, the trainable part and frozen wide parameters. sums: units whose unfinished gradients wait in
    host memory between rounds. sum_slabs: buffers for gradients that the host adds to them. shard: the rank's
    share of each unit. packing: the format of packed parts; "" without any. saved: names of the parameters in
    a checkpoint, if the others can be read again; None for all.
    """

    dtype: torch.dtype
    moment_dtype: torch.dtype = torch.float32
    second_moment: bool = True
    slabs: GradientSlabs | None = None
    resident: frozenset[int] = _NONE
    split: frozenset[int] = _NONE
    sums: frozenset[int] = _NONE
    sum_slabs: int = 0
    shard: Shard = WHOLE
    packing: str = ""
    saved: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "moment_dtype"):
            if getattr(self, name) not in (torch.bfloat16, torch.float32):
                raise ValueError(f"{name}={getattr(self, name)}; hint: bfloat16 or float32")

    def cut(self, unit: int, layout: UnitLayout) -> UnitShard:
        """What the rank holds of a unit in its regions."""
        begin = layout.wide_offset if unit in self.split else layout.packed_numel
        return UnitShard(layout, self.shard, begin)


@dataclass(frozen=True)
class Region:
    """One row of the memory table, used to allocate, report and predict.

    numels: elements of each flat buffer; one per unit, or per slab. resident: units whose buffers lie in
    device memory. is_state: whether the region is part of the model or of what training changes, rather than
    a gradient. is_frozen: nothing changes it.
    """

    name: str
    dtype: torch.dtype
    numels: Callable[[Sequence[UnitLayout]], list[int]]
    pinned: bool = False
    resident: frozenset[int] = _NONE
    is_state: bool = True
    is_frozen: bool = False

    @property
    def is_updated(self) -> bool:
        """Whether updates read and write the region."""
        return self.is_state and not self.is_frozen

    def host_numels(self, units: Sequence[UnitLayout]) -> list[int]:
        """Elements of each buffer in host memory; 0 for those on the device."""
        return [0 if u in self.resident else numel for u, numel in enumerate(self.numels(units))]

    def device_numels(self, units: Sequence[UnitLayout]) -> list[int]:
        """Elements of each buffer in device memory; 0 for those on the host."""
        return [numel if u in self.resident else 0 for u, numel in enumerate(self.numels(units))]


def _of_each(numel_of: Callable[[UnitLayout], int]) -> Callable[[Sequence[UnitLayout]], list[int]]:
    return lambda units: [numel_of(unit) for unit in units]


def regions(spec: StoreSpec) -> list[Region]:
    """List the regions of a store, their buffers as `UnitShard` has them."""
    resident, share = spec.resident, spec.shard.share
    trainable = _of_each(lambda unit: share(unit.trainable_numel))

    def weights(units: Sequence[UnitLayout]) -> list[int]:
        return [spec.cut(u, unit).weights_numel for u, unit in enumerate(units)]

    def frozen(units: Sequence[UnitLayout]) -> list[int]:
        return [
            unit.wide_offset - unit.packed_numel if u in spec.split else 0 for u, unit in enumerate(units)
        ]

    rows = [Region("weights", spec.dtype, weights, pinned=True, resident=resident)]
    if spec.packing:
        sizes = _of_each(lambda unit: packed_bytes(unit.packed_numel, spec.packing))
        rows.append(Region("packed", torch.uint8, sizes, pinned=True, is_frozen=True))
    if spec.split:
        rows.append(Region("frozen", spec.dtype, frozen, pinned=True, is_frozen=True))
    if spec.dtype == torch.bfloat16:
        residual = _of_each(
            lambda unit: share(unit.trainable_offset - unit.wide_offset) + share(unit.trainable_numel)
        )
        rows.append(Region("residual", torch.int16, residual, resident=resident))
    rows.append(Region("exp_avg", spec.moment_dtype, trainable, resident=resident))
    if spec.second_moment:
        rows.append(Region("exp_avg_sq", spec.moment_dtype, trainable, resident=resident))
    if spec.slabs is None:
        rows.append(Region("grads", spec.dtype, trainable, pinned=True, resident=resident, is_state=False))
    else:
        slabs = partial(spec.slabs.numels, resident=resident, shard=spec.shard)
        rows.append(Region("grad_slabs", spec.dtype, slabs, pinned=True, is_state=False))
    return [*rows, *_sum_regions(spec)]


def _sum_regions(spec: StoreSpec) -> Iterator[Region]:
    if not spec.sums:
        return

    def sums(units: Sequence[UnitLayout]) -> list[int]:
        shares = (spec.shard.share(unit.trainable_numel) for unit in units)
        return [share if u in spec.sums else 0 for u, share in enumerate(shares)]

    yield Region("sums", torch.float32, sums, pinned=True, is_state=False)
    if spec.sum_slabs:
        yield Region(
            "sum_slabs",
            torch.float32,
            lambda units: [max(sums(units))] * spec.sum_slabs,
            pinned=True,
            is_state=False,
        )


def predict_bytes(units: Sequence[UnitLayout], spec: StoreSpec) -> dict[str, int]:
    """Predict the host bytes of a rank by region."""
    return {row.name: sum(row.host_numels(units)) * row.dtype.itemsize for row in regions(spec)}


def predict_device_bytes(units: Sequence[UnitLayout], spec: StoreSpec) -> dict[str, int]:
    """Predict the device bytes of a rank's resident units by region; empty without them."""
    return {
        f"resident_{row.name}": sum(row.device_numels(units)) * row.dtype.itemsize
        for row in regions(spec)
        if row.resident
    }


def state_bytes(units: Sequence[UnitLayout], spec: StoreSpec) -> int:
    """Predict the bytes of a rank's weights and optimizer state in a checkpoint, wherever they lie."""
    rows = [row for row in regions(spec) if row.is_state]
    if spec.saved is None:
        return sum(sum(row.numels(units)) * row.dtype.itemsize for row in rows)
    return sum(
        spec.shard.share(parameter.numel) * row.dtype.itemsize
        for unit in units
        for row in rows
        if row.is_updated
        for parameter in saved_in(row.name, unit, spec)
    )


def saved_in(region: str, unit: UnitLayout, spec: StoreSpec) -> Iterator[Parameter]:
    """Yield the parameters whose values in a region are part of a checkpoint."""
    for parameter in unit.parameters:
        if spec.saved is not None and parameter.name not in spec.saved:
            continue
        if parameter.offset < unit.packed_numel:  # packed again from the model
            continue
        if region == "residual" and parameter.offset < unit.wide_offset:
            continue
        if region.startswith("exp_avg") and not parameter.trainable:
            continue
        yield parameter
