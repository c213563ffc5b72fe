"""HostStore: weights, gradients and optimizer state, in host memory or, for resident units, on the device.

Each region is an exact allocation of all units: in host memory in mappings of about 1 GiB that hold whole
units, in device memory as one block:

    weights     bf16 (or fp32)  2 (4) bytes   compute copy and upper half of the master, pinned
    residual    int16           2 (0)         lower half of the fp32 master; pinned for wide parameters
    exp_avg     fp32 or bf16    4 (2)         first moment
    exp_avg_sq  fp32 or bf16    4 (2)         second moment; none with sgd and lion
    grads       bf16 (or fp32)  2 (4)         gradients of the last forward_backward, pinned
    sums        fp32            4             unfinished gradients between rounds, in host memory, pinned

`weights` covers all parameters, the other regions only trainable ones, except that `residual` includes frozen
wide ones. Eager updates replace `grads` by a few slabs in host memory (`GradientSlabs`); gradients of
resident units then stay in their slots. `sum_slabs` are buffers for gradients that the host adds to `sums`.

Of several ranks each holds its share of every unit (memory/shards.py): `units` are the whole layouts, the
buffers those of the rank. `whole` and `Whole` (memory/whole.py) gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import DoesNotFitError
from horizon_lm.memory import arena
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.master import join_master, split_master
from horizon_lm.memory.registration import pin
from horizon_lm.memory.shards import WHOLE, Shard, UnitShard
from horizon_lm.words import count, size

_NONE: frozenset[int] = frozenset()
_CPU = torch.device("cpu")


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

    dtype: weight and gradient dtype, bf16 or fp32. resident: units that live in device memory. sums: units
    whose unfinished gradients wait in host memory between rounds. sum_slabs: buffers for gradients that the
    host adds to them. shard: the rank's share of each unit. saved: names of the parameters in a checkpoint,
    if the others can be read again; None for all.
    """

    dtype: torch.dtype
    moment_dtype: torch.dtype = torch.float32
    second_moment: bool = True
    slabs: GradientSlabs | None = None
    resident: frozenset[int] = _NONE
    sums: frozenset[int] = _NONE
    sum_slabs: int = 0
    shard: Shard = WHOLE
    saved: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "moment_dtype"):
            if getattr(self, name) not in (torch.bfloat16, torch.float32):
                raise ValueError(f"{name}={getattr(self, name)}; hint: bfloat16 or float32")


@dataclass(frozen=True)
class Region:
    """One row of the memory table, used to allocate, report and predict.

    numels: elements of each flat buffer; one per unit, or per slab. resident: units whose buffers lie in
    device memory. is_state: whether the region is part of what training changes, rather than a gradient.
    """

    name: str
    dtype: torch.dtype
    numels: Callable[[Sequence[UnitLayout]], list[int]]
    pinned: bool = False
    resident: frozenset[int] = _NONE
    is_state: bool = True

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
    weights = _of_each(lambda unit: share(unit.trainable_offset) + share(unit.trainable_numel))
    rows = [Region("weights", spec.dtype, weights, pinned=True, resident=resident)]
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
        for parameter in saved_in(row.name, unit, spec)
    )


def saved_in(region: str, unit: UnitLayout, spec: StoreSpec) -> Iterator[Parameter]:
    """Yield the parameters whose values in a region are part of a checkpoint."""
    for parameter in unit.parameters:
        if spec.saved is not None and parameter.name not in spec.saved:
            continue
        if region == "residual" and parameter.offset < unit.wide_offset:
            continue
        if region.startswith("exp_avg") and not parameter.trainable:
            continue
        yield parameter


class HostStore:
    """All parameters of a model, their gradients and optimizer state; of several ranks, a share of each.

    units: the whole layouts. shards: what this rank holds of them. device: where units compute, and resident
    ones live.
    """

    def __init__(
        self,
        units: Sequence[UnitLayout],
        spec: StoreSpec,
        *,
        pin_for: torch.device | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """pin_for: the device to which weights are copied."""
        self.device = device
        self.units = tuple(units)
        self.spec = spec
        self.shards = tuple(UnitShard(unit, spec.shard) for unit in units)
        self._runs: dict[str, list[torch.Tensor]] = {}
        self._num_bytes: dict[str, int] = {}
        self._device_bytes: dict[str, int] = {}
        for region in regions(spec):
            sizes = [numel * region.dtype.itemsize for numel in region.host_numels(units)]
            runs = arena.allocate_runs(sizes, pin_for=pin_for if region.pinned else None)
            self._runs[region.name] = [run.view(region.dtype) for run in runs]
            self._num_bytes[region.name] = sum(run.nbytes for run in runs)
        for region in regions(spec):
            if region.resident:
                self._add_residents(region, device)
        if pin_for is not None and pin_for.type == "cuda":
            # Only the pages of residuals that the device needs, since locked memory may be limited.
            pin([self.wide_residual(u) for u in range(len(units)) if not self.is_resident(u)], pin_for)
        self._place = {p.name: (u, p) for u, unit in enumerate(units) for p in unit.parameters}

    def _add_residents(self, region: Region, device: torch.device) -> None:
        numels = region.device_numels(self.units)
        try:
            block = torch.zeros(sum(numels), dtype=region.dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"the device refused {size(sum(numels) * region.dtype.itemsize)} for the {region.name} of "
                f"{count(len(region.resident), 'resident unit')}",
                hint="lower resident; resident=0 leaves all units in host memory",
            ) from error
        for unit, run in enumerate(block.split(numels)):
            if unit in region.resident:
                self._runs[region.name][unit] = run
        self._device_bytes[f"resident_{region.name}"] = block.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Weight and gradient dtype."""
        return self.spec.dtype

    def is_resident(self, unit: int) -> bool:
        """Whether the unit's regions lie in device memory."""
        return unit in self.spec.resident

    def run(self, region: str, unit: int) -> torch.Tensor:
        """The rank's flat buffer of a unit in a region, wherever it lies.

        With one rank [numel], [residual_numel] or [trainable_numel]; else, padding included, as `shards`
        have it: [weights_numel], [residual_numel] or [trainable_share].
        """
        return self._runs[region][unit]

    def host_copy(self, region: str, unit: int) -> torch.Tensor:
        """The same in host memory: the buffer itself, or a new copy of a resident unit's."""
        return self.run(region, unit).cpu()

    def whole(self, region: str, unit: int, ranks: Ranks, everywhere: bool) -> torch.Tensor | None:
        """Gather a unit's whole flat buffer in host memory, as one rank alone would hold it: on all ranks, or
        on the first (None on others). A view into the store if it holds all of it. All ranks call this."""
        own, shard = self.host_copy(region, unit), self.shards[unit]
        assert ranks.world == shard.shard.world, "the ranks are not those of the store"
        if ranks.world == 1:
            return own
        runs = ranks.gather_all(own) if everywhere else ranks.gather(own)
        if runs is None:
            return None
        parts = [shard.of_rank(rank).pieces(region) for rank in range(ranks.world)]
        found = own.new_empty(max((part.stop for pieces in parts for part in pieces), default=0))
        for run, pieces in zip(runs, parts, strict=True):
            for start, stop, offset in pieces:
                found[start:stop] = run[offset : offset + stop - start]
        return found

    def gradient_run(self, unit: int, slab: int = -1) -> torch.Tensor:
        """The flat buffer of the rank's gradient of a unit [trainable_share]: in a slab, or its own."""
        if slab < 0:
            return self.run("grads", unit)
        return self.run("grad_slabs", slab)[: self.shards[unit].trainable_share]

    def sum_run(self, unit: int) -> torch.Tensor:
        """Host buffer of the rank's unfinished gradient of a unit, fp32 [trainable_share]."""
        return self.run("sums", unit)

    def sum_slab(self, slab: int) -> torch.Tensor:
        """Host buffer for a gradient to be added to `sum_run`, fp32; as large as the largest of them."""
        return self.run("sum_slabs", slab)

    def has(self, region: str) -> bool:
        return region in self._runs

    @property
    def num_bytes(self) -> dict[str, int]:
        """Allocated host bytes by region."""
        return dict(self._num_bytes)

    @property
    def device_bytes(self) -> dict[str, int]:
        """Allocated bytes of resident units by region, named as by `predict_device_bytes`."""
        return dict(self._device_bytes)

    def locate(self, name: str) -> tuple[int, Parameter]:
        """The unit number and layout of a parameter. Raises KeyError for an unknown name."""
        return self._place[name]

    def names(self) -> Iterator[str]:
        return iter(self._place)

    # Whole parameters: with several ranks, gathered by `Whole`

    def weight(self, name: str) -> torch.Tensor:
        """The parameter's compute copy in host memory, shaped as in the model: a view, or a new copy of
        a resident unit's."""
        return self.weight_view(name).cpu()

    def weight_view(self, name: str) -> torch.Tensor:
        """View of the parameter's compute copy, wherever it lies."""
        unit, parameter = self._whole_place(name)
        return self.units[unit].view(self.run("weights", unit), parameter)

    def gradient(self, name: str, slab: int = -1) -> torch.Tensor:
        """View of a trainable parameter's gradient, shaped as in the model, wherever it lies."""
        unit, parameter = self._whole_place(name)
        return self.units[unit].trainable_view(self.gradient_run(unit, slab), parameter)

    def _residual_view(self, name: str) -> torch.Tensor | None:
        unit, parameter = self._whole_place(name)
        if not self.has("residual") or parameter.offset < self.units[unit].wide_offset:
            return None
        return self.units[unit].residual_view(self.run("residual", unit), parameter)

    def _whole_place(self, name: str) -> tuple[int, Parameter]:
        assert self.spec.shard.world == 1, "a rank holds a share: gather the parameter (memory/whole.py)"
        return self._place[name]

    def master(self, name: str) -> torch.Tensor:
        """The parameter's fp32 master as a new tensor in host memory, shaped as in the model."""
        weight, residual = self.weight(name), self._residual_view(name)
        if residual is None:
            return weight.to(torch.float32, copy=True)
        return join_master(weight, residual.cpu())

    def wide_residual(self, unit: int) -> torch.Tensor:
        """The rank's residuals of the unit's wide parameters [wide_numel of its shard], wherever they lie;
        empty in an fp32 store."""
        if not self.has("residual") or not self.units[unit].wide_numel:
            return torch.empty(0, dtype=torch.int16)
        return self.run("residual", unit)[: self.shards[unit].wide_numel]

    def adopt(self, name: str, value: torch.Tensor) -> None:
        """Copy a whole parameter in host memory into the store as its fp32 master, residual included.

        Of several ranks each copies what it holds, and reads nothing else of a contiguous value.
        """
        unit, parameter = self._place[name]
        regions = ["weights", *(["residual"] if self.has("residual") else [])]
        pieces = {region: self.shards[unit].piece(region, parameter) for region in regions}
        value = value.expand(parameter.shape).reshape(-1)
        # Pieces differ where several ranks hold a frozen wide parameter.
        for start, stop in {(piece.start, piece.stop) for piece in pieces.values() if piece is not None}:
            targets = {
                region: self.run(region, unit).narrow(0, piece.offset, piece.numel)
                for region, piece in pieces.items()
                if piece is not None and (piece.start, piece.stop) == (start, stop)
            }
            self._write_master(value[start:stop], targets.get("weights"), targets.get("residual"))

    def _write_master(
        self, value: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None
    ) -> None:
        """Write the halves of fp32 masters [n] that the rank holds."""
        if residual is None or value.dtype == torch.bfloat16:  # fp16 has more digits than bf16
            if weight is not None:
                weight.copy_(value)  # rounded to nearest, as `split_master` does
            if residual is not None:
                residual.zero_()
            return
        if weight is None:
            weight = torch.empty(value.shape, dtype=self.dtype)
        with in_host_memory(weight) as one, in_host_memory(residual) as other:
            split_master(value, one, other)


@contextmanager
def in_host_memory(target: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield host memory to write `target`'s next content to: itself, or a buffer that is copied to the device
    at the end. The buffer starts uninitialized."""
    if target.device.type == "cpu":
        yield target
        return
    staged = torch.empty(target.shape, dtype=target.dtype)
    yield staged
    target.copy_(staged)
