"""HostStore: host memory as the authority of weights, gradients and optimizer state.

Each region is one exact allocation with the units side by side in it:

    weights     bf16 (or fp32)  2 (4) bytes   compute copy and upper half of the master, pinned
    residual    int16           2 (0)         lower half of the fp32 master
    exp_avg     fp32            4             first moment
    exp_avg_sq  fp32            4             second moment
    grads       bf16 (or fp32)  2 (4)         gradients of the last forward_backward, pinned

`weights` covers all parameters; the other regions cover the trainable ones, and `residual` also
the frozen ones that are computed with in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import arena
from .layout import Parameter, UnitLayout
from .master import join_master, split_master


@dataclass(frozen=True)
class Region:
    """One row of the memory table: it allocates, reports and predicts."""

    name: str
    dtype: torch.dtype
    numel: Callable[[UnitLayout], int]
    pinned: bool

    def num_bytes(self, units: Sequence[UnitLayout]) -> int:
        return sum(self.numel(unit) for unit in units) * self.dtype.itemsize


def _all(unit: UnitLayout) -> int:
    return unit.numel


def _trainable(unit: UnitLayout) -> int:
    return unit.trainable_numel


def _with_residual(unit: UnitLayout) -> int:
    return unit.residual_numel


def regions(dtype: torch.dtype) -> list[Region]:
    """The regions of a store whose compute dtype is bf16 or fp32."""
    rows = [
        Region("weights", dtype, _all, pinned=True),
        Region("exp_avg", torch.float32, _trainable, pinned=False),
        Region("exp_avg_sq", torch.float32, _trainable, pinned=False),
        Region("grads", dtype, _trainable, pinned=True),
    ]
    if dtype == torch.bfloat16:
        rows.insert(1, Region("residual", torch.int16, _with_residual, pinned=False))
    elif dtype != torch.float32:
        raise ValueError(f"dtype={dtype}; hint: bfloat16 or float32")
    return rows


def predict_bytes(units: Sequence[UnitLayout], dtype: torch.dtype) -> dict[str, int]:
    """Host bytes by region, before anything is allocated."""
    return {region.name: region.num_bytes(units) for region in regions(dtype)}


class HostStore:
    """All parameters of a model, their gradients and optimizer state, in host memory."""

    def __init__(self, units: Sequence[UnitLayout], dtype: torch.dtype, *, pin: bool = False) -> None:
        self.units = tuple(units)
        self.dtype = dtype
        self._runs: dict[str, list[torch.Tensor]] = {}
        for region in regions(dtype):
            block = arena.allocate(region.num_bytes(units), pin=pin and region.pinned).view(region.dtype)
            self._runs[region.name] = list(block.split([region.numel(unit) for unit in units]))
        self._place = {p.name: (u, p) for u, unit in enumerate(units) for p in unit.parameters}

    def run(self, region: str, unit: int) -> torch.Tensor:
        """The unit's contiguous 1-D run in a region: [numel], or [trainable_numel]."""
        return self._runs[region][unit]

    def has(self, region: str) -> bool:
        return region in self._runs

    @property
    def num_bytes(self) -> dict[str, int]:
        """Allocated bytes by region."""
        return {name: sum(run.nbytes for run in runs) for name, runs in self._runs.items()}

    def locate(self, name: str) -> tuple[int, Parameter]:
        """The unit number and place of a parameter. Raises KeyError for an unknown name."""
        return self._place[name]

    def names(self) -> Iterator[str]:
        return iter(self._place)

    def weight(self, name: str) -> torch.Tensor:
        """View of the parameter's compute copy, shape as in the model."""
        unit, parameter = self._place[name]
        return self.units[unit].view(self.run("weights", unit), parameter)

    def gradient(self, name: str) -> torch.Tensor:
        """View of a trainable parameter's gradient, shape as in the model."""
        unit, parameter = self._place[name]
        return self.units[unit].trainable_view(self.run("grads", unit), parameter)

    def wide_residual(self, unit: int) -> torch.Tensor:
        """The residuals of the unit's wide parameters, 1-D [wide_numel]; empty in an fp32 store."""
        if not self.has("residual"):
            return torch.empty(0, dtype=torch.int16)
        return self.run("residual", unit)[: self.units[unit].wide_numel]

    def _residual(self, name: str) -> torch.Tensor | None:
        unit, parameter = self._place[name]
        if not self.has("residual") or parameter.offset < self.units[unit].wide_offset:
            return None
        return self.units[unit].residual_view(self.run("residual", unit), parameter)

    def adopt(self, name: str, value: torch.Tensor) -> None:
        """Copy a parameter into the store as its fp32 master (residual included)."""
        residual = self._residual(name)
        if residual is not None and value.dtype != torch.bfloat16:  # fp16 has more digits than bf16
            split_master(value, self.weight(name), residual)
        else:
            self.weight(name).copy_(value)  # same dtype, or exact widening
            if residual is not None:
                residual.zero_()

    def master(self, name: str) -> torch.Tensor:
        """The parameter's fp32 master as a new tensor, shape as in the model."""
        residual = self._residual(name)
        if residual is None:
            return self.weight(name).to(torch.float32, copy=True)
        return join_master(self.weight(name), residual)
