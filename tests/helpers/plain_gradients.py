"""A step of plain transformers and of the streamed model."""

from __future__ import annotations

import copy
from typing import Any

import torch

import horizon_lm as hz


def plain(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of ordinary autograd; a parameter that received none has zeros."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}


def stream(model: torch.nn.Module, dtype: str = "float32", **settings: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(
        copy.deepcopy(model), device="cpu", dtype=dtype, skip_memory_check=True, **settings
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
