"""A unit's parameters in one contiguous run: offsets, shapes, and views. Offsets are made here only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

# Each parameter starts at a multiple of this many elements: 32 bytes in bf16, 64 in fp32, which
# vector loads and cuBLAS like. Model dimensions are multiples of it, so gaps hardly occur.
ALIGN_ELEMENTS = 16


@dataclass(frozen=True)
class Parameter:
    """One parameter inside its unit's run.

    name: Hugging Face name. offset: elements from the start of the unit.
    compute_dtype: what the module is given; fp32 for the few that transformers keeps in fp32.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    trainable: bool
    compute_dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class UnitLayout:
    """The run of one unit: frozen parameters first, trainable after, so that gradients and
    moments exist for the trainable part alone.

    numel: elements of the whole run, trainable_offset: where the trainable part starts.
    """

    name: str
    parameters: tuple[Parameter, ...]
    numel: int
    trainable_offset: int

    @property
    def trainable_numel(self) -> int:
        return self.numel - self.trainable_offset

    @property
    def trainable(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    def view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The parameter's view into `run`, a 1-D tensor of the whole unit [numel]."""
        return run.narrow(0, parameter.offset, parameter.numel).view(parameter.shape)

    def trainable_view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The parameter's view into `run`, a 1-D tensor of the trainable part [trainable_numel]."""
        return run.narrow(0, parameter.offset - self.trainable_offset, parameter.numel).view(parameter.shape)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(start, length) of padding inside the trainable part, counted from its start."""
        end = self.trainable_offset
        for parameter in self.trainable:
            if parameter.offset > end:
                yield end - self.trainable_offset, parameter.offset - end
            end = parameter.offset + parameter.numel
        if self.numel > end:
            yield end - self.trainable_offset, self.numel - end


def lay_out(name: str, parameters: Iterable[tuple[str, tuple[int, ...], bool, torch.dtype]]) -> UnitLayout:
    """Pack (name, shape, trainable, compute dtype) rows into a unit, in the given order."""
    rows = sorted(parameters, key=lambda row: row[2])  # stable: frozen first
    placed: list[Parameter] = []
    offset = 0
    trainable_offset = None
    for row_name, shape, trainable, dtype in rows:
        if trainable and trainable_offset is None:
            trainable_offset = offset
        placed.append(Parameter(row_name, tuple(shape), offset, trainable, dtype))
        offset += -(-prod(shape) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    return UnitLayout(name, tuple(placed), offset, offset if trainable_offset is None else trainable_offset)
