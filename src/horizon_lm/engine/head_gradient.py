"""The gradient of the projection to logits, accumulated in fp32 with one product per loss chunk.

Autograd would make a bf16 gradient [vocabulary, width] per chunk and add it to the sum in another pass. On
CUDA, a product of bf16 matrices can add to an fp32 matrix directly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.memory.layout import Parameter
from horizon_lm.model.head import forward_replaced
from horizon_lm.model.skeleton import Skeleton

_log = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
    """out [m, n] in fp32 = left [m, k] @ right [k, n] in half precision, added to what is there if `adds`."""
    if adds:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)


@cache
def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` add up in fp32 on the device, in place: tried once, on whole numbers with
    more digits than half precision holds. Waits for the device."""
    if device.type != "cuda" or dtype not in _HALF:
        return False
    # On the host whatever the caller's default device is.
    left = (torch.arange(40 * 24, device="cpu") * 37 % 123 - 61).view(40, 24)
    right = (torch.arange(40 * 16, device="cpu") * 29 % 123 - 61).view(40, 16)
    try:
        factors = left.to(dtype).to(device).t(), right.to(dtype).to(device)
        run = torch.full((3, 24 * 16), torch.nan, dtype=torch.float32, device=device)
        for adds in (False, True):
            _multiply(*factors, run[1].view(24, 16), adds=adds)
        found = run.cpu()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError) as error:  # a torch or a device without such products
        _log.info("the head's gradient is added in %s: %s", dtype, error)
        return False
    wanted = 2 * (left.t() @ right).float()
    is_sound = torch.equal(found[1].view(24, 16), wanted) and bool(found[::2].isnan().all())
    if not is_sound:
        _log.info("the head's gradient is added in %s: products in fp32 are wrong on this device", dtype)
    return is_sound


class _Sums(NamedTuple):
    """The gradient of a unit, and weight and bias of the projection in it (None: it has no bias)."""

    gradient: UnitGradient
    weight: Parameter
    bias: Parameter | None

    def add(self, output_gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the gradients of outputs [n, vocabulary] computed from inputs [n, width]."""
        view = self.gradient.layout.trainable_view(self.gradient.run, self.weight)
        _multiply(output_gradient.t(), inputs, view, adds=self.weight.name in self.gradient.written)
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
    device = gradient.run.device
    if device.type != "cuda" or gradient.run.dtype != torch.float32:
        return None
    trainable = {p.name: p for p in gradient.layout.trainable if adds_in_fp32(device, p.compute_dtype)}
    named = {local: skeleton.name_of(projection, local) for local in ("weight", "bias")}
    weight, bias = (trainable.get(named[local]) for local in ("weight", "bias"))
    if weight is None or (projection.bias is not None and bias is None):
        return None
    return _Sums(gradient, weight, bias)
