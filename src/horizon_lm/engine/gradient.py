"""The gradient of one unit on its way: collected from autograd, accumulated in a slot, brought home."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from horizon_lm.engine.transfer import download_gradient, square_norm
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.gradients import add_gradients


class UnitGradient:
    """The gradient of one unit while it is accumulated in a slot.

    Parameters that received nothing (an expert without tokens) are zeros in their own place.
    at_home: the slot is the store's own run and of its dtype, so that nothing is left to download.
    adds: several gradients of each parameter are to come. On the CPU they are then added two at a time, and
    the first of two stays where autograd put it.
    """

    def __init__(
        self, layout: UnitLayout, run: torch.Tensor, *, at_home: bool = False, adds: bool = False
    ) -> None:
        self.layout = layout
        self.run = run  # [trainable_numel]
        self.at_home = at_home
        self.in_pairs = adds and run.device.type == "cpu"
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

    def download(self, home: torch.Tensor, *, measure: bool) -> torch.Tensor | None:
        """Bring the complete gradient to its place in host memory and return its squared norm; None
        where it is there already, and need not be measured before the norm is asked for."""
        self.in_pairs = False
        for parameter in self.layout.trainable:
            if parameter.name in self.waiting:  # the last of an odd number
                self.add(parameter, self.waiting.pop(parameter.name))
            elif parameter.name not in self.written:
                self.layout.trainable_view(self.run, parameter).zero_()
        for start, length in self.layout.gaps():
            self.run.narrow(0, start, length).zero_()
        if self.at_home:
            return square_norm(self.run) if measure else None
        return download_gradient(self.run, home)


@contextmanager
def collecting(
    skeleton: Skeleton, unit: int, leaves: dict[str, torch.Tensor], gradient: UnitGradient | None
) -> Iterator[None]:
    """While open, gradients of the unit's leaves move into its slot as soon as they exist."""
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
