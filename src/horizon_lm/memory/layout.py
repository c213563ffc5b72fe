"""A unit's parameters in one contiguous run: offsets, shapes, and views. Offsets are made here only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

# Each parameter starts at a multiple of this many elements: 256 bytes in bf16, as those that PyTorch
# allocates, so that cuBLAS picks the same kernels. Model dimensions are mostly multiples of it, so
# gaps hardly occur.
ALIGN_ELEMENTS = 128


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

    The few parameters that a bf16 model keeps in fp32 ("wide") stand side by side where the two
    parts meet. They are computed with at full precision, so their residuals go to the device too:

        frozen | frozen wide | trainable wide | trainable
               ^ wide_offset ^ trainable_offset
               [ wide_numel elements          ]
               [ residual ...                            ] numel

    numel: elements of the whole run.
    """

    name: str
    parameters: tuple[Parameter, ...]
    numel: int
    trainable_offset: int
    wide_offset: int
    wide_numel: int

    @property
    def trainable_numel(self) -> int:
        return self.numel - self.trainable_offset

    @property
    def residual_numel(self) -> int:
        """Elements that have a residual: the trainable ones and the frozen wide ones."""
        return self.numel - self.wide_offset

    @property
    def slot_numel(self) -> int:
        """Elements of a device slot: the weights, and the residuals of the wide parameters."""
        return self.numel + self.wide_numel

    @property
    def trainable(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    def view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The parameter's view into `run`, a 1-D tensor of the whole unit [numel]."""
        return run.narrow(0, parameter.offset, parameter.numel).view(parameter.shape)

    def trainable_view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The parameter's view into `run`, a 1-D tensor of the trainable part [trainable_numel]."""
        return run.narrow(0, parameter.offset - self.trainable_offset, parameter.numel).view(parameter.shape)

    def residual_view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The parameter's view into `run`, a 1-D tensor of residuals: [residual_numel] or [wide_numel]."""
        return run.narrow(0, parameter.offset - self.wide_offset, parameter.numel).view(parameter.shape)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(start, length) of padding inside the trainable part, counted from its start."""
        end = self.trainable_offset
        for parameter in self.trainable:
            if parameter.offset > end:
                yield end - self.trainable_offset, parameter.offset - end
            end = parameter.offset + parameter.numel
        if self.numel > end:
            yield end - self.trainable_offset, self.numel - end


def lay_out(
    name: str, parameters: Iterable[tuple[str, tuple[int, ...], bool, torch.dtype]], dtype: torch.dtype
) -> UnitLayout:
    """Pack (name, shape, trainable, compute dtype) rows into a unit of a store of `dtype`, keeping
    their order within each of the four parts."""
    parts: list[list[tuple[str, tuple[int, ...], bool, torch.dtype]]] = [[], [], [], []]
    for row in parameters:
        trainable, wide = row[2], row[3] != dtype
        parts[(2 if wide else 3) if trainable else (1 if wide else 0)].append(row)
    placed: list[Parameter] = []
    starts = []
    offset = 0
    for part in parts:
        starts.append(offset)
        for row_name, shape, trainable, compute in part:
            placed.append(Parameter(row_name, tuple(shape), offset, trainable, compute))
            offset += -(-prod(shape) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    return UnitLayout(name, tuple(placed), offset, starts[2], starts[1], starts[3] - starts[1])
