"""Models with any number of layers, streamed and by full autograd, for tests of activation policies."""

from __future__ import annotations

from typing import Any

import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained

LAYERS = 4
Gradients = dict[str, torch.Tensor]


def source(name: str, layers: int = LAYERS) -> Any:
    config = zoo.CASES[name].config()
    if config.num_hidden_layers != layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
    attn = "eager" if zoo.CASES[name].attn == "eager" else "sdpa"
    model = zoo._from_config(config, torch.float32, seed=0, attn=attn)
    zoo._perturb(model, torch.Generator().manual_seed(1))
    return model.train()


def host(name: str, lanes: str = "inline", **settings: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, "lanes": lanes}
    return from_pretrained(source(name), **(values | settings))


def batches(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=9, seed=m + 1) for m in range(count)]


def gradients(model: hz.HostModel) -> Gradients:
    return {name: gradient.clone() for name, gradient in model.named_gradients()}


def same(one: Gradients, two: Gradients) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


class Stashing(torch.autograd.Function):
    """A linear map that keeps its weight in an attribute, where saved-tensor hooks do not reach."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight, grad.flatten(0, 1).T @ x.flatten(0, 1)
