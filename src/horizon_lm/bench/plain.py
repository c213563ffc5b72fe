"""Plain torch as a system: transformers in device memory, fused AdamW on fp32 masters.

This is the in-memory reference. `case.activations` selects activation checkpointing in all layers or in none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.protocol import Case


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups; biases and 1-D parameters are not decayed, as in Horizon-LM."""
    return groups_of([(n, p) for n, p in model.named_parameters() if p.requires_grad], weight_decay)


def groups_of(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return `decay_groups` for named parameters."""
    decayed = [p for n, p in named if p.ndim > 1 and not n.endswith("bias")]
    spared = [p for n, p in named if p.ndim <= 1 or n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def prepare(model: Any, case: Case) -> Any:
    """Prepare for training: no cache, activation checkpointing unless activations=keep."""
    model.config.use_cache = False
    model.train()
    if case.activations != "keep":
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: Any) -> None:
    """Enable activation checkpointing of every layer. The method is named `gradient_checkpointing_enable` in
    transformers 5.17; both variants are non-reentrant by default."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def adam_options(case: Case) -> dict[str, Any]:
    return {"lr": case.lr, "betas": case.betas, "eps": case.eps, "fused": True}


def backward(model: nn.Module, micro_batches: list[torch.Tensor], device: torch.device) -> float:
    """Run a step's forward and backward for the mean loss over all its tokens; return that loss."""
    total = sum(ids.numel() - len(ids) for ids in micro_batches)  # nothing predicts a first token
    loss = 0.0
    for ids in micro_batches:
        share = (ids.numel() - len(ids)) / total
        ids = ids.to(device)
        part = model(input_ids=ids, labels=ids).loss * share
        part.backward()
        loss += float(part.detach())
    return loss


class Plain:
    """bf16 compute weights with fp32 masters for AdamW (one copy if the case is fp32).

    extra: masters=False trains in pure bf16, 8 bytes per parameter, which is not the same training.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        source = source_model(case)
        self.masters = None
        if case.torch_dtype != torch.float32 and case.extra.get("masters", True):
            self.masters = {
                n: nn.Parameter(p.detach().to(self.device, torch.float32, copy=True))
                for n, p in source.named_parameters()
            }
        self.model = prepare(own(source, case.torch_dtype, self.device), case)
        self.optimizer = torch.optim.AdamW(self._groups(), **adam_options(case))

    def _groups(self) -> list[dict[str, Any]]:
        groups = decay_groups(self.model, self.case.weight_decay)
        if self.masters is not None:
            of = {id(p): self.masters[n] for n, p in self.model.named_parameters()}
            groups = [group | {"params": [of[id(p)] for p in group["params"]]} for group in groups]
        return groups

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss = backward(self.model, micro_batches, self.device)
        named = list(self.model.named_parameters())
        if self.masters is not None:
            for name, parameter in named:
                assert parameter.grad is not None
                self.masters[name].grad, parameter.grad = parameter.grad.float(), None
        if self.case.clip:
            held = self.masters.values() if self.masters is not None else self.model.parameters()
            nn.utils.clip_grad_norm_(held, self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            with torch.no_grad():
                for name, parameter in named:
                    parameter.copy_(self.masters[name])
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def build(case: Case) -> Plain:
    return Plain(case)
