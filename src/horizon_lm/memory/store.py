"""HostStore: weights, gradients and optimizer state in host memory.

Each region is an exact allocation of all units, in mappings of about 1 GiB that hold whole units:

    weights     bf16 (or fp32)  2 (4) bytes   compute copy and upper half of the master, pinned
    residual    int16           2 (0)         lower half of the fp32 master; pinned for wide parameters
    exp_avg     fp32 or bf16    4 (2)         first moment
    exp_avg_sq  fp32 or bf16    4 (2)         second moment; none with sgd and lion
    grads       bf16 (or fp32)  2 (4)         gradients of the last forward_backward, pinned

`weights` covers all parameters, the other regions only trainable ones, except that `residual` includes frozen
wide ones. Eager updates replace `grads` by a few slabs (`GradientSlabs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from horizon_lm.memory import arena
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.master import join_master, split_master
from horizon_lm.memory.registration import pin


@dataclass(frozen=True)
class GradientSlabs:
    """Host buffers for the gradients of eager updates: `count` for layers and prologue, round-robin, and one
    shared by the units `outer` (head and embedding table)."""

    count: int
    outer: frozenset[int]

    def numels(self, units: Sequence[UnitLayout]) -> list[int]:
        """Elements of each slab, the shared one last."""
        inner = [u.trainable_numel for i, u in enumerate(units) if i not in self.outer]
        outer = [units[i].trainable_numel for i in self.outer]
        return [max(inner, default=0)] * self.count + [max(outer, default=0)]


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds per parameter. dtype: weight and gradient dtype, bf16 or fp32."""

    dtype: torch.dtype
    moment_dtype: torch.dtype = torch.float32
    second_moment: bool = True
    slabs: GradientSlabs | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "moment_dtype"):
            if getattr(self, name) not in (torch.bfloat16, torch.float32):
                raise ValueError(f"{name}={getattr(self, name)}; hint: bfloat16 or float32")


@dataclass(frozen=True)
class Region:
    """One row of the memory table, used to allocate, report and predict.

    numels: elements of each flat buffer; one per unit, or per slab.
    """

    name: str
    dtype: torch.dtype
    numels: Callable[[Sequence[UnitLayout]], list[int]]
    pinned: bool = False

    def num_bytes(self, units: Sequence[UnitLayout]) -> int:
        return sum(self.numels(units)) * self.dtype.itemsize


def _all(units: Sequence[UnitLayout]) -> list[int]:
    return [unit.numel for unit in units]


def _trainable(units: Sequence[UnitLayout]) -> list[int]:
    return [unit.trainable_numel for unit in units]


def _with_residual(units: Sequence[UnitLayout]) -> list[int]:
    return [unit.residual_numel for unit in units]


def regions(spec: StoreSpec) -> list[Region]:
    """List the regions of a store."""
    rows = [Region("weights", spec.dtype, _all, pinned=True)]
    if spec.dtype == torch.bfloat16:
        rows.append(Region("residual", torch.int16, _with_residual))
    rows.append(Region("exp_avg", spec.moment_dtype, _trainable))
    if spec.second_moment:
        rows.append(Region("exp_avg_sq", spec.moment_dtype, _trainable))
    if spec.slabs is None:
        rows.append(Region("grads", spec.dtype, _trainable, pinned=True))
    else:
        rows.append(Region("grad_slabs", spec.dtype, spec.slabs.numels, pinned=True))
    return rows


def predict_bytes(units: Sequence[UnitLayout], spec: StoreSpec) -> dict[str, int]:
    """Predict host bytes by region."""
    return {region.name: region.num_bytes(units) for region in regions(spec)}


class HostStore:
    """All parameters of a model, their gradients and optimizer state, in host memory."""

    def __init__(
        self, units: Sequence[UnitLayout], spec: StoreSpec, *, pin_for: torch.device | None = None
    ) -> None:
        """pin_for: the device to which weights are copied."""
        self.units = tuple(units)
        self.spec = spec
        self._runs: dict[str, list[torch.Tensor]] = {}
        for region in regions(spec):
            sizes = [numel * region.dtype.itemsize for numel in region.numels(units)]
            runs = arena.allocate_runs(sizes, pin_for=pin_for if region.pinned else None)
            self._runs[region.name] = [run.view(region.dtype) for run in runs]
        if pin_for is not None and pin_for.type == "cuda":
            # Only the pages of residuals that the device needs, since locked memory may be limited.
            pin([self.wide_residual(unit) for unit in range(len(units))], pin_for)
        self._place = {p.name: (u, p) for u, unit in enumerate(units) for p in unit.parameters}

    @property
    def dtype(self) -> torch.dtype:
        """Weight and gradient dtype."""
        return self.spec.dtype

    def run(self, region: str, unit: int) -> torch.Tensor:
        """The unit's flat buffer in a region: [numel], or [trainable_numel]."""
        return self._runs[region][unit]

    def gradient_run(self, unit: int, slab: int = -1) -> torch.Tensor:
        """The flat buffer of the unit's gradient [trainable_numel]: in a slab, or its own."""
        if slab < 0:
            return self.run("grads", unit)
        return self.run("grad_slabs", slab)[: self.units[unit].trainable_numel]

    def has(self, region: str) -> bool:
        return region in self._runs

    @property
    def num_bytes(self) -> dict[str, int]:
        """Allocated bytes by region."""
        return {name: sum(run.nbytes for run in runs) for name, runs in self._runs.items()}

    def locate(self, name: str) -> tuple[int, Parameter]:
        """The unit number and layout of a parameter. Raises KeyError for an unknown name."""
        return self._place[name]

    def names(self) -> Iterator[str]:
        return iter(self._place)

    def weight(self, name: str) -> torch.Tensor:
        """View of the parameter's compute copy, shaped as in the model."""
        unit, parameter = self._place[name]
        return self.units[unit].view(self.run("weights", unit), parameter)

    def gradient(self, name: str, slab: int = -1) -> torch.Tensor:
        """View of a trainable parameter's gradient, shaped as in the model."""
        unit, parameter = self._place[name]
        return self.units[unit].trainable_view(self.gradient_run(unit, slab), parameter)

    def wide_residual(self, unit: int) -> torch.Tensor:
        """Residuals of the unit's wide parameters [wide_numel]; empty in an fp32 store."""
        if not self.has("residual"):
            return torch.empty(0, dtype=torch.int16)
        return self.run("residual", unit)[: self.units[unit].wide_numel]

    def _residual(self, name: str) -> torch.Tensor | None:
        unit, parameter = self._place[name]
        if not self.has("residual") or parameter.offset < self.units[unit].wide_offset:
            return None
        return self.units[unit].residual_view(self.run("residual", unit), parameter)

    def adopt(self, name: str, value: torch.Tensor) -> None:
        """Copy a parameter into the store as its fp32 master, residual included."""
        residual = self._residual(name)
        if residual is not None and value.dtype != torch.bfloat16:  # fp16 has more digits than bf16
            split_master(value, self.weight(name), residual)
        else:
            self.weight(name).copy_(value)  # same dtype, or exact widening
            if residual is not None:
                residual.zero_()

    def master(self, name: str) -> torch.Tensor:
        """The parameter's fp32 master as a new tensor, shaped as in the model."""
        residual = self._residual(name)
        if residual is None:
            return self.weight(name).to(torch.float32, copy=True)
        return join_master(self.weight(name), residual)
