"""The gradient of the projection to logits, accumulated in fp32 with one product per loss chunk.

Autograd would make a bf16 gradient [vocabulary, width] per chunk and add it to the sum in another pass. On
CUDA, a product of bf16 matrices can add to an fp32 matrix directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.memory.layout import Parameter
from horizon_lm.model.head import forward_replaced
from horizon_lm.model.skeleton import Skeleton

_HALF = (torch.bfloat16, torch.float16)


class _Sums(NamedTuple):
    """The gradient of a unit, and weight and bias of the projection in it (None: it has no bias)."""

    gradient: UnitGradient
    weight: Parameter
    bias: Parameter | None

    def add(self, output_gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the gradients of outputs [n, vocabulary] computed from inputs [n, width]."""
        view = self.gradient.layout.trainable_view(self.gradient.run, self.weight)
        factors = output_gradient.t(), inputs
        if self.weight.name in self.gradient.written:
            torch.ops.aten.addmm.dtype_out(view, *factors, torch.float32, out=view)
        else:
            torch.ops.aten.mm.dtype_out(*factors, torch.float32, out=view)
            self.gradient.written.add(self.weight.name)
        if self.bias is not None:
            self.gradient.add(self.bias, output_gradient.sum(0, dtype=torch.float32))


class _Project(torch.autograd.Function):
    """F.linear that adds the gradients of weight and bias to `sums`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sums: _Sums
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.sums = sums
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        flat = output_gradient.flatten(0, -2)
        ctx.sums.add(flat, inputs.flatten(0, -2))
        return (flat @ weight).view(inputs.shape), None, None, None


@contextmanager
def projection_into(skeleton: Skeleton, unit: int, gradient: UnitGradient | None) -> Iterator[None]:
    """While open, add the projection's gradients to `gradient` by products in fp32. Applies on CUDA to a
    plain projection in half precision whose gradient accumulates in fp32; otherwise changes nothing."""
    projection: Any = skeleton.model.get_output_embeddings() if unit == skeleton.head else None
    sums = _sums(skeleton, projection, gradient)
    if sums is None:
        yield
        return

    def forward(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.requires_grad or inputs.dtype != module.weight.dtype:
            return F.linear(inputs, module.weight, module.bias)
        bias = None if module.bias is None else module.bias.detach()
        output: torch.Tensor = _Project.apply(inputs, module.weight.detach(), bias, sums)
        return output

    with forward_replaced(projection, partial(forward, projection)):
        yield


def _sums(skeleton: Skeleton, projection: Any, gradient: UnitGradient | None) -> _Sums | None:
    if type(projection) is not nn.Linear or "forward" in projection.__dict__ or gradient is None:
        return None
    if gradient.run.device.type != "cuda" or gradient.run.dtype != torch.float32:
        return None
    trainable = {p.name: p for p in gradient.layout.trainable if p.compute_dtype in _HALF}
    named = {local: skeleton.name_of(projection, local) for local in ("weight", "bias")}
    weight, bias = (trainable.get(named[local]) for local in ("weight", "bias"))
    if weight is None or (projection.bias is not None and bias is None):
        return None
    return _Sums(gradient, weight, bias)
