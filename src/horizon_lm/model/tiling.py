"""Tiled MLPs, for sequences whose intermediate activations would not fit.

Each tile of tokens is recomputed in the backward pass, so only one tile's activations exist at a time, and
the layer keeps only the input and output of its MLP (sequence tiling of Arctic Long Sequence Training,
arXiv:2506.13996).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_here = threading.local()  # in_tile: set while a tile is computed

NAMES = ("mlp", "feed_forward", "ffn", "ff")


def find_mlps(layer: nn.Module) -> list[nn.Module]:
    """Find the layer's token-wise MLPs: those whose parameters all belong to linear maps.

    Excludes mixtures of experts, which route tokens between experts.
    """
    return [child for name, child in layer.named_children() if name in NAMES and _is_token_wise(child)]


def _is_token_wise(module: nn.Module) -> bool:
    kinds = {
        type(owner).__name__
        for owner in module.modules()
        for parameter in owner._parameters.values()
        if parameter is not None
    }
    return bool(kinds) and kinds <= {"Linear", "Conv1D"}


def tile_mlps(layers: list[nn.Module], tile_tokens: int) -> int:
    """Replace the forward of the layers' MLPs by a tiled one; return their number. A recomputed tile draws
    the same dropout masks."""
    count = 0
    for layer in layers:
        for module in find_mlps(layer):
            whole = module.forward
            module.forward = partial(_in_tiles, whole, tile_tokens)  # type: ignore[method-assign]
            count += 1
    return count


def _in_tiles(whole: Any, tile_tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [batch, tokens, width]."""
    if hidden.shape[1] <= tile_tokens:
        return whole(hidden)
    tiles = hidden.split(tile_tokens, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([whole(tile) for tile in tiles], dim=1)
    run = partial(checkpoint, whole, use_reentrant=False)
    with _computing_tiles():
        return torch.cat([run(tile) for tile in tiles], dim=1)


@contextmanager
def _computing_tiles() -> Iterator[None]:
    _here.in_tile = True
    try:
        yield
    finally:
        _here.in_tile = False


def in_tile() -> bool:
    """Whether the calling thread computes a tile, which is recomputed in the backward pass anyway."""
    return getattr(_here, "in_tile", False)
