"""Whole: parameters of a sharded store as one rank alone would have them, gathered unit by unit."""

from __future__ import annotations

import torch

from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.memory.master import join_master
from horizon_lm.memory.store import HostStore


class Whole:
    """A reader of whole parameters, for as long as nothing changes the store.

    All ranks ask for the same names in the same order. everywhere: all ranks get values; otherwise the first
    one does, and others get meta tensors of the same shape and dtype. The unit last asked for is kept, so
    that its parameters are gathered together. With one rank nothing is gathered: results are the store's.
    """

    def __init__(self, store: HostStore, ranks: Ranks = ALONE, *, everywhere: bool = True) -> None:
        self.store, self.ranks, self._everywhere = store, ranks, everywhere
        self._unit = -1
        self._runs: dict[str, torch.Tensor] = {}

    def weight(self, name: str) -> torch.Tensor:
        """The parameter's compute copy, as `HostStore.weight`."""
        if self.ranks.world == 1:
            return self.store.weight(name)
        unit, parameter = self.store.locate(name)
        return self.store.units[unit].view(self.run("weights", unit), parameter)

    def master(self, name: str) -> torch.Tensor:
        """The parameter's fp32 master as a new tensor, as `HostStore.master`."""
        if self.ranks.world == 1:
            return self.store.master(name)
        unit, parameter = self.store.locate(name)
        layout = self.store.units[unit]
        if not self.store.has("residual") or parameter.offset < layout.wide_offset:
            return self.weight(name).to(torch.float32, copy=True)
        return join_master(self.weight(name), layout.residual_view(self.run("residual", unit), parameter))

    def gradient(self, name: str) -> torch.Tensor:
        """A trainable parameter's gradient, as `HostStore.gradient`."""
        if self.ranks.world == 1:
            return self.store.gradient(name)
        unit, parameter = self.store.locate(name)
        return self.store.units[unit].trainable_view(self.run("grads", unit), parameter)

    def wide_residual(self, unit: int) -> torch.Tensor:
        """Residuals of the unit's wide parameters [wide_numel of its layout], as one rank would have them."""
        if self.ranks.world == 1 or not self.store.wide_residual(unit).numel():
            return self.store.wide_residual(unit)
        return self.run("residual", unit)[: self.store.units[unit].wide_numel]

    def run(self, region: str, unit: int) -> torch.Tensor:
        """The unit's whole flat buffer, as `HostStore.whole`."""
        if unit != self._unit:
            self._unit, self._runs = unit, {}
        if region not in self._runs:
            found = self.store.whole(region, unit, self.ranks, self._everywhere)
            self._runs[region] = self._hollow(region, unit) if found is None else found
        return self._runs[region]

    def _hollow(self, region: str, unit: int) -> torch.Tensor:
        layout = self.store.units[unit]
        sizes = {"weights": layout.numel, "residual": layout.residual_numel}
        dtype = self.store.run(region, unit).dtype
        return torch.empty(sizes.get(region, layout.trainable_numel), dtype=dtype, device="meta")
