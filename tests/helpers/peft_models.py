"""Tiny models with adapters of PEFT, and what ordinary autograd makes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch

import zoo
from adversarial import from_pretrained
from horizon_lm.host_model import HostModel
from horizon_lm.machine.libraries import load_peft

PREFIX = "base_model.model."
Batch = dict[str, torch.Tensor]
State = dict[str, torch.Tensor]


def adapted(name: str, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **config: Any) -> Any:
    """The zoo's model as a PeftModel whose adapter has gradients everywhere: its matrices are random, where
    PEFT begins one of each pair with zeros."""
    peft = load_peft()
    values = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    if "type" in values:
        made = getattr(peft, values.pop("type"))(**values)
    else:
        made = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "lora_dropout": dropout, **values})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = peft.get_peft_model(zoo.build(name, dtype=dtype), made, autocast_adapter_dtype=False)
    shake(model)
    return model.train()


def shake(model: Any, seed: int = 7) -> None:
    """Add random values to all trained parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def host(model: Any, dtype: str = "float32", **settings: Any) -> HostModel:
    """A HostModel of a copy."""
    values = {"device": "cpu", "dtype": dtype, "skip_memory_check": True, **settings}
    return from_pretrained(copy.deepcopy(model), **values)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of a PeftModel by the names they have in its base model."""
    named = {name.removeprefix(PREFIX): p for name, p in model.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def autograd(model: Any, micro_batches: list[Batch]) -> tuple[float, State]:
    """Loss and gradients of the mean over all target tokens, accumulated as users of PyTorch do."""
    model.zero_grad()
    count = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches))
    options = {"num_items_in_batch": count} if len(micro_batches) > 1 else {}
    loss = 0.0
    for batch in micro_batches:
        found = model(**batch, use_cache=False, **options).loss
        found.backward()
        loss += found.item()
    wanted = trained(model).items()
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in wanted}


def differing(one: State, two: State) -> list[str]:
    """Names that only one has, or whose bits differ."""
    names = sorted(one.keys() | two.keys())
    return [n for n in names if n not in one or n not in two or not torch.equal(one[n], two[n])]
