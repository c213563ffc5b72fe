"""The gradient of one unit: collected from autograd, summed in a slot, downloaded and measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.shards import BLOCK
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.gradients import add_gradient, add_gradients, move_gradient

_PIECE = 1 << 24  # elements, 64 MB of fp32; whole blocks


class UnitGradient:
    """The gradient of one unit while it accumulates in a slot.

    Parameters that receive nothing (an expert without tokens) are zeros in their own place.
    at_home: the slot is the store's own buffer in its dtype, so nothing needs downloading.
    in_pairs: several gradients per parameter will arrive in host memory. They are added two at a time, and
    the first of each pair stays where autograd put it, until the second arrives or the round ends.
    written: parameters that received something; the rest of `run` is undefined until `complete`.
    """

    def __init__(
        self, layout: UnitLayout, run: torch.Tensor, *, at_home: bool = False, in_pairs: bool = False
    ) -> None:
        self.layout = layout
        self.run = run  # [trainable_numel]
        self.at_home = at_home
        self.in_pairs = in_pairs
        self.waiting: dict[str, torch.Tensor] = {}
        self.written: set[str] = set()

    def add(self, parameter: Parameter, gradient: torch.Tensor) -> None:
        name = parameter.name
        if self.in_pairs and name not in self.waiting:
            self.waiting[name] = gradient
            return
        view = self.layout.trainable_view(self.run, parameter)
        if self.in_pairs:
            add_gradients(view, self.waiting.pop(name), gradient, begins=name not in self.written)
        elif name in self.written:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self.written.add(name)

    def add_rows(
        self, parameter: Parameter, rows: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Add to the rows [r] of a table's gradient, once: values [r, width] in `dtype` or fp32.

        dtype: the store's, to which the sum is rounded. If the head shares the table, its gradient is already
        here and is rounded before the sum, as if both had been computed separately.
        """
        table = self.layout.trainable_view(self.run, parameter)
        if parameter.name in self.written or parameter.name in self.waiting:
            self.complete()
            values = table.index_select(0, rows).to(dtype) + values
        else:
            table.zero_()
            self.written.add(parameter.name)
        table.index_copy_(0, rows, values.to(dtype).to(table.dtype))

    def settle(self) -> None:
        """Add waiting gradients: the last ones of an odd number."""
        for parameter in self.layout.trainable if self.waiting else ():
            name = parameter.name
            if name in self.waiting:
                view = self.layout.trainable_view(self.run, parameter)
                add_gradient(view, self.waiting.pop(name), begins=name not in self.written)
                self.written.add(name)

    def complete(self) -> None:
        """Add waiting gradients, and zero those of parameters that received none."""
        self.settle()
        self.in_pairs = False
        for parameter in self.layout.trainable:
            if parameter.name not in self.written:
                self.layout.trainable_view(self.run, parameter).zero_()
                self.written.add(parameter.name)
        for start, length in self.layout.gaps():
            self.run.narrow(0, start, length).zero_()

    def download(self, target: torch.Tensor, *, measure: bool) -> torch.Tensor | None:
        """Copy the complete gradient to its host buffer and return its squares (`download_gradient`).

        Returns None if it is there already and `measure` is false: the norm is then taken on demand.
        """
        self.complete()
        if self.at_home:
            return squares(self.run) if measure else None
        return download_gradient(self.run, target)

    def round(self, dtype: torch.dtype) -> torch.Tensor:
        """Round the complete gradient to the values of `dtype` where it is, and return its squares."""
        self.complete()
        return round_gradient(self.run, dtype)


@contextmanager
def collecting(
    skeleton: Skeleton, unit: int, leaves: dict[str, torch.Tensor], gradient: UnitGradient | None
) -> Iterator[None]:
    """While open, move gradients of the unit's leaves into its slot as soon as they exist."""
    handles = []
    for parameter in skeleton.units[unit].trainable:
        assert gradient is not None

        def collect(leaf: torch.Tensor, parameter: Parameter = parameter) -> None:
            assert leaf.grad is not None
            gradient.add(parameter, leaf.grad)
            leaf.grad = None

        handles.append(leaves[parameter.name].register_post_accumulate_grad_hook(collect))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def download_gradient(
    run: torch.Tensor, target: torch.Tensor, *, through: torch.dtype | None = None
) -> torch.Tensor:
    """Copy a gradient [n] (bf16 or fp32, on the device) to where the update reads it [n], in host memory or
    on the device, and return its squares.

    Squares are the sums over each BLOCK elements, fp64 on the device, so the host never scans gradients to
    measure them. They are of the values the optimizer reads, after rounding to the dtype of target (or
    `through`). `optim.gradients.ordered_sum` adds them up.
    """
    dtype = through or target.dtype
    if run.device.type == "cpu":
        return move_gradient(run, target)
    size = min(_PIECE, -(-run.numel() // BLOCK) * BLOCK)
    rounded = torch.empty(size, dtype=dtype, device=run.device)
    wide = torch.empty(size, dtype=torch.float32, device=run.device)
    found = torch.empty(-(-run.numel() // BLOCK), dtype=torch.float64, device=run.device)
    for piece, place, block in zip(
        run.split(size), target.split(size), found.split(size // BLOCK), strict=True
    ):
        if piece.dtype != dtype:
            piece = rounded[: piece.numel()].copy_(piece)
        place.copy_(piece, non_blocking=True)
        whole = wide[: block.numel() * BLOCK]
        whole[: piece.numel()].copy_(piece)
        whole[piece.numel() :].zero_()
        block.copy_(_sums_of_squares(whole.view(-1, BLOCK)))
    return found


def _sums_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each row [n, BLOCK] in fp32, overwriting them. Elementwise operations, so
    that the bits of a row do not depend on n, as those of torch's reductions do."""
    rows.square_()
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half].add_(rows[:, half:])
    return rows[:, 0]


def round_gradient(run: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a gradient [n] to the values of `dtype` where it is, and return its squares."""
    if run.device.type != "cpu":
        return download_gradient(run, run, through=dtype)
    if run.dtype != dtype:
        for piece in run.split(_PIECE):
            piece.copy_(piece.to(dtype))
    return squares(run)


def squares(run: torch.Tensor) -> torch.Tensor:
    """Squares of a gradient [n] (bf16 or fp32) in host memory, as of `download_gradient`."""
    return move_gradient(run, run)
