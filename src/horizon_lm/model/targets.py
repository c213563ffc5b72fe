"""Layers that PEFT wraps as linear ones although their outputs are something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def odd_target(model: nn.Module) -> str | None:
    """Return the name of a layer under an adapter that is a subclass of nn.Linear and returns something else
    than a linear layer, and its class; None if there is none.

    PEFT takes all subclasses for linear layers: routers that return a tuple, and grouped products.
    """
    for name, module in model.named_modules():
        base: Any = getattr(module, "base_layer", None)
        has_own = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if has_own and not _is_linear(base):
            return f"{name} ({type(base).__name__})"
    return None


def _is_linear(layer: nn.Linear) -> bool:
    row = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        with torch.no_grad():
            output = layer(row)
    except Exception:  # whatever its forward raises for such a row
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)
