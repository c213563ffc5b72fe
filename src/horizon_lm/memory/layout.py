"""Layout of a unit's parameters in one flat buffer. Offsets are computed only here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

# Alignment of each parameter, in elements: 256 bytes in bf16, as PyTorch allocates, so that cuBLAS picks the
# same kernels. Model dimensions are mostly multiples of it, so gaps are rare.
ALIGN_ELEMENTS = 128


@dataclass(frozen=True)
class Parameter:
    """One parameter in its unit's flat buffer.

    name: Hugging Face name. offset: elements from the start of the unit. compute_dtype: dtype bound to the
    module; fp32 for the few that transformers keeps in fp32.
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
    """The flat buffer of one unit: frozen parameters first, then trainable ones, so that gradients and
    moments cover only the trainable part.

    The few parameters that a bf16 model keeps in fp32 ("wide") are adjacent where the two parts meet, since
    their residuals go to the device too. Frozen parameters that are stored in few bits come first:

        packed | frozen | frozen wide | trainable wide | trainable
               |        ^ wide_offset ^ trainable_offset
               |        [ wide_numel elements          ]
               |        [ residual ...                            ] numel
               ^ packed_numel

    numel: elements of the whole buffer.
    """

    name: str
    parameters: tuple[Parameter, ...]
    numel: int
    trainable_offset: int
    wide_offset: int
    wide_numel: int
    packed_numel: int = 0

    @property
    def trainable_numel(self) -> int:
        return self.numel - self.trainable_offset

    @property
    def residual_numel(self) -> int:
        """Elements with a residual: trainable and frozen wide ones."""
        return self.numel - self.wide_offset

    @property
    def slot_numel(self) -> int:
        """Elements of a device slot: weights, and residuals of wide parameters."""
        return self.numel + self.wide_numel

    @property
    def trainable(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    def view(self, run: torch.Tensor, parameter: Parameter, begin: int = 0) -> torch.Tensor:
        """View the parameter in `run`, a buffer of the whole unit [numel], or of what begins at `begin`."""
        return run.narrow(0, parameter.offset - begin, parameter.numel).view(parameter.shape)

    def trainable_view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """View the parameter in `run`, a buffer of the trainable part [trainable_numel]."""
        return run.narrow(0, parameter.offset - self.trainable_offset, parameter.numel).view(parameter.shape)

    def residual_view(self, run: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """View the parameter in `run`, a buffer of residuals: [residual_numel] or [wide_numel]."""
        return run.narrow(0, parameter.offset - self.wide_offset, parameter.numel).view(parameter.shape)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(start, length) of padding in the trainable part, relative to its start."""
        end = self.trainable_offset
        for parameter in self.trainable:
            if parameter.offset > end:
                yield end - self.trainable_offset, parameter.offset - end
            end = parameter.offset + parameter.numel
        if self.numel > end:
            yield end - self.trainable_offset, self.numel - end


def lay_out(
    name: str,
    parameters: Iterable[tuple[str, tuple[int, ...], bool, torch.dtype]],
    dtype: torch.dtype,
    packed: Collection[str] = (),
) -> UnitLayout:
    """Lay out (name, shape, trainable, compute dtype) rows as a unit of a store of `dtype`, keeping their
    order within each of the five parts. packed: names of parameters to be stored in few bits, of those that
    are frozen and not wide."""
    parts: list[list[tuple[str, tuple[int, ...], bool, torch.dtype]]] = [[], [], [], [], []]
    for row in parameters:
        trainable, wide = row[2], row[3] != dtype
        frozen = 2 if wide else 0 if row[0] in packed else 1
        parts[(3 if wide else 4) if trainable else frozen].append(row)
    placed: list[Parameter] = []
    starts = []
    offset = 0
    for part in parts:
        starts.append(offset)
        for row_name, shape, trainable, compute in part:
            placed.append(Parameter(row_name, tuple(shape), offset, trainable, compute))
            offset += -(-prod(shape) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    return UnitLayout(name, tuple(placed), offset, starts[3], starts[2], starts[4] - starts[2], starts[1])
