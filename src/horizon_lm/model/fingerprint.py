"""Fingerprint of what a run with an adapter leaves as it is: the base, unit by unit.

A checkpoint of such a run holds the adapter and this; whoever adds the base again can tell whether it is the
same. Values count as they were loaded, in their own dtype, so that no setting of the run matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash

from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.model.adapters import Adapter, base_name

Fingerprint = dict[str, str]  # unit -> xxh3-128 of its parameters, in hexadecimal digits


class Fingerprinter:
    """Takes the parameters of the base as they are loaded; of several ranks, each takes the units of its
    turn."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self._rank, self._world = rank, world
        self._found: dict[str, dict[str, str]] = {}

    def add(self, number: int, unit: str, name: str, value: torch.Tensor) -> None:
        """Take a parameter, in host memory, of the unit `number`, which is called `unit`."""
        if number % self._world == self._rank:
            self._found.setdefault(unit, {})[base_name(name)] = _digest(value)

    def of_all(self, ranks: Ranks = ALONE) -> Fingerprint:
        """Return the fingerprint of the whole base. All ranks call this."""
        told: list[dict[str, str]] = [self._own()]
        if ranks.world > 1:
            told = ranks.exchange(told[0])
        return {unit: digest for one in told for unit, digest in one.items()}

    def _own(self) -> Fingerprint:
        return {
            unit: xxhash.xxh3_128_hexdigest(repr(sorted(digests.items())).encode())
            for unit, digests in self._found.items()
        }


def saved_names(units: Iterable[UnitLayout], adapter: Adapter | None) -> frozenset[str] | None:
    """Return the names of the parameters that a checkpoint holds; None for all of a model without adapter."""
    if adapter is None:
        return None
    named = [parameter for unit in units for parameter in unit.parameters]
    return frozenset(p.name for p in named if p.trainable or adapter.is_part(p.name))


def _digest(value: torch.Tensor) -> str:
    """Return dtype, shape and xxh3-128 of a parameter."""
    value = value.detach()
    head = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} ".encode()
    digest = xxhash.xxh3_128(head)
    if value.numel():
        data: Any = value.contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(data)
    return str(digest.hexdigest())


def differing(then: Mapping[str, str], now: Mapping[str, Any]) -> list[str]:
    """Return the units whose base differs, or that only one of two has, in the order of `then`."""
    units = [*then, *(unit for unit in now if unit not in then)]
    return [unit for unit in units if then.get(unit) != now.get(unit)]
