"""The update in torch operations: serves without a compiler, and tests compare the kernel with it.

The same IEEE operations in the same order as csrc/optimizer.cpp, hence bitwise identical. Each operation
rounds once: torch's `lerp`, `addcmul` and `addcdiv` may fuse a multiplication with an addition on some
machines.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from horizon_lm.memory.master import join_master, split_master
from horizon_lm.optim.rules import (
    ADAPTIVE_RULES,
    Coefficients,
    Numbers,
    Tensors,
    check_update,
    coefficients,
)

_CHUNK = 1 << 18  # elements; an update needs no memory but the temporaries of a chunk (about 6 MB)
_TINY = torch.finfo(torch.float32).tiny
_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


@torch.no_grad()
def update(tensors: Tensors, numbers: Numbers) -> None:
    """Update in place, as `kernel.update` does, on torch's own threads."""
    check_update(tensors, numbers)
    c = coefficients(numbers)
    offset = numbers.element_offset
    for start, end in _pieces(tensors.numel, offset):
        part = tensors.part(start, end)
        weight, moment, square = part.weights, part.exp_avg, part.exp_avg_sq
        master = weight if part.residual is None else join_master(weight, part.residual)
        m = moment.to(torch.float32)
        v = None if square is None else square.to(torch.float32)
        _compute(numbers.rule, c, master, part.grads.to(torch.float32) * c.grad_scale, m, v)
        if moment.dtype == torch.bfloat16:
            random = random_bits(numbers.seed, numbers.step, offset + start, end - start)
        else:
            random = None
        _store_moment(moment, m, random)
        if square is not None and v is not None:
            _store_moment(square, v, None if random is None else random >> 16)
        master.masked_fill_(master.isnan(), torch.nan)
        if part.residual is not None:
            split_master(master, weight, part.residual)
            _mend_nan(master, weight, part.residual)


def _pieces(count: int, offset: int) -> Iterator[tuple[int, int]]:
    """Cut [0, count) where `offset` + element is a multiple of _CHUNK: no piece crosses one of 2**32."""
    start = 0
    while start < count:
        end = min(count, start + _CHUNK - (offset + start) % _CHUNK)
        yield start, end
        start = end


def _compute(
    rule: str,
    c: Coefficients,
    master: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor | None,
) -> None:
    """Apply the rule to fp32 tensors in place: master, m (exp_avg), v (exp_avg_sq)."""
    if rule in ("adam", "sgd"):
        grad.add_(master * c.weight_decay)
    else:
        master.mul_(c.decay)
    if rule in ADAPTIVE_RULES:
        assert v is not None
        _lerp_(m, grad, c.take1)
        v.mul_(c.beta2).add_((grad * c.take2).mul_(grad))
        # numpy's sqrt is correctly rounded; torch's goes through MKL and is one ulp off for one in 200.
        with np.errstate(invalid="ignore"):
            root = torch.from_numpy(np.sqrt(v.numpy()))
        master.sub_((m * c.step_size).div_(root.mul_(c.rescale2).add_(c.epsilon)))
    elif rule == "sgd":
        m.mul_(c.momentum).add_(grad)
        master.sub_(m * c.step_size)
    else:
        direction = _lerp_(m.clone(), grad, c.take1)
        one = torch.ones(())
        sign = torch.where(direction > 0, one, torch.where(direction < 0, -one, direction))  # NaN stays NaN
        master.sub_(sign.mul_(c.step_size))
        _lerp_(m, grad, c.take2)


def _lerp_(start: torch.Tensor, end: torch.Tensor, weight: float) -> torch.Tensor:
    """Move `start` towards `end` by `weight`, in place, from the nearer end as torch.lerp does."""
    step = end - start
    if weight < 0.5:
        return start.add_(step.mul_(weight))
    return start.copy_(end).add_(step.mul_(weight - 1))  # exact in fp32, as weight is an fp32


def _store_moment(place: torch.Tensor, value: torch.Tensor, random: torch.Tensor | None) -> None:
    """Store fp32 `value`, denormals as zero; rounded to bf16 by the low 16 bits of `random`."""
    value.masked_fill_(value.abs() < _TINY, 0.0)
    value.masked_fill_(value.isnan(), torch.nan)
    if random is None:
        place.copy_(value)
    else:
        bits = value.view(torch.int32) + (random & 0xFFFF).to(torch.int32)
        place.view(torch.int16).copy_(bits >> 16)


def _mend_nan(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Store a NaN as 0x7FC0 with residual 0; torch's cast to bf16 gives various bit patterns."""
    nan = master.isnan()
    weight.masked_fill_(nan, torch.nan)
    residual.masked_fill_(nan, 0)


def random_bits(seed: int, step: int, element: int, count: int) -> torch.Tensor:
    """Return 32 random bits for each of `count` elements from number `element` of the store: int64 [count].

    A function of its arguments alone: two keys, mixed with the element by Wellons' lowbias32. All elements
    must lie in one block of 2**32.
    """
    first, second = rounding_keys(seed, step, element)
    x = torch.arange(count, dtype=torch.int64) + (element & _MASK32)
    x ^= first
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15) ^ second) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def rounding_keys(seed: int, step: int, element: int) -> tuple[int, int]:
    """Two keys of 32 bits for the element's block of 2**32, by splitmix64 (Steele, Lea and Flood 2014)."""
    key = _splitmix64(_splitmix64(_splitmix64(seed) ^ step) ^ (element >> 32))
    return key & _MASK32, key >> 32


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
