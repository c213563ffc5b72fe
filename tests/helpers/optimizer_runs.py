"""Tensors of an update, for the C++ kernel and the optimizers that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import pytest
import torch

from horizon_lm.memory.master import join_master, split_master
from horizon_lm.optim import kernel
from horizon_lm.optim.rules import Hyper, Numbers, Tensors

BF16, FP32 = torch.bfloat16, torch.float32
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int16: torch.int16}
HYPER = Hyper(lr=1e-3, weight_decay=0.1, momentum=0.9)
_NUMBERS = {field.name for field in fields(Numbers)}
needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C++ library is hidden, and nobody has been told yet."""
    monkeypatch.setattr(kernel, "EXTENSION_SUFFIXES", [])
    monkeypatch.setattr(kernel, "_is_told", False)
    kernel._found.cache_clear()
    yield
    kernel._found.cache_clear()


@dataclass
class Run:
    """The five runs of an update, each 1-D [n]."""

    weights: torch.Tensor
    residual: torch.Tensor | None
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def clone(self) -> Run:
        return Run(*(None if t is None else t.clone() for t in self.tensors()))

    def part(self, start: int, end: int) -> Run:
        return Run(*(None if t is None else t[start:end] for t in self.tensors()))

    def master(self) -> torch.Tensor:
        if self.residual is None:
            return self.weights.to(FP32, copy=True)
        return join_master(self.weights, self.residual)

    def bits(self) -> list[torch.Tensor]:
        return [t.view(BITS[t.dtype]) for t in self.tensors() if t is not None]

    def update(self, rule: str, by=kernel.update, **settings) -> Run:
        """Update in place; `by` is a function of kernel or reference; settings: numbers, and its own."""
        numbers = {"hyper": HYPER, "step": 3}
        numbers |= {key: settings.pop(key) for key in _NUMBERS & settings.keys()}
        by(Tensors(*self.tensors()), Numbers(rule, **numbers), **settings)
        return self


def make_run(
    n: int, *, rule: str = "adamw", weights=BF16, grads=BF16, moments=FP32, seed: int = 0, wild: bool = False
) -> Run:
    """Values like those of training; `wild`: any bit pattern; half are zeros, denormals, NaNs, infinities."""
    generator = torch.Generator().manual_seed(seed)

    def values(dtype: torch.dtype, scale: float) -> torch.Tensor:
        if not wild:
            return (torch.randn(n, generator=generator) * scale).to(dtype)
        bits = torch.randint(-(1 << 31), 1 << 31, (n,), generator=generator).to(torch.int32)
        kind = torch.randint(0, 8, (n,), generator=generator)
        bits = torch.where(kind == 0, bits & -0x7F800001, bits)  # zeros and denormals
        bits = torch.where(kind == 1, bits & -0x80000000, bits)  # zeros
        bits = torch.where(kind == 2, bits | 0x7F800000, bits)  # NaN
        bits = torch.where(kind == 3, bits & -0x80000000 | 0x7F800000, bits)  # infinities
        bits = torch.where(kind == 4, bits & -0x7F800000 | 0x3F800000, bits)  # near 1
        return bits.view(FP32) if dtype == FP32 else (bits >> 16).to(torch.int16).view(BF16)

    residual = torch.zeros(n, dtype=torch.int16) if weights == BF16 else None
    weight = torch.empty(n, dtype=BF16) if weights == BF16 else values(FP32, 0.02)
    if residual is not None:
        split_master(values(FP32, 0.02), weight, residual)
    square = values(moments, 1e-3).square() if rule in ("adamw", "adam") else None
    return Run(weight, residual, values(grads, 1e-2), values(moments, 1e-2), square)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m, (b1, b2) = self.state[p].setdefault("m", torch.zeros_like(p)), group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(b1 * m + (1 - b1) * p.grad) * group["lr"])
                m.mul_(b2).add_(p.grad * (1 - b2))
