"""Rotary embeddings whose frequencies depend on text length: `dynamic` (NTK) and `longrope`.

transformers takes the largest position of a call as the length of everything in it, so packing changes the
frequencies of documents, and `dynamic` keeps those of the longest call for later ones. Here each document has
the frequencies of its own length, independent of what ran before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode

Embeddings = torch.Tensor | tuple[torch.Tensor, ...]  # each [rows, tokens, ...]


def separate_documents(model: nn.Module) -> None:
    """Make the model's rotary modules give each document of a call the frequencies of its own length.

    Documents are delimited by positions: within one, each position is the last plus one, as in the masks that
    transformers makes from positions. Rows without position_ids share the length of the longest, padding
    included, as in transformers.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        takes = inspect.signature(module.forward).parameters
        if any(_depends_on_length(kind) for kind in kinds) and "position_ids" in takes:
            module.forward = partial(_forward, module, module.forward)


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _forward(
    module: Any,
    forward: Callable[..., Embeddings],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> Embeddings:
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    run = partial(forward, x, **({} if layer_type is None else {"layer_type": layer_type}))
    if not _depends_on_length(kind):
        return run(position_ids)
    if detect_fake_mode() is not None:  # fake tensors: no positions, and any give the same shapes
        with _as_default(module):
            return run(position_ids)
    _forget_longest(module, layer_type)
    long = _long_documents(position_ids, _limit(module, kind, layer_type))
    if not long:
        return run(position_ids)
    short = position_ids.clone()
    for row, tokens in long:
        short[row, tokens] = 0
    found = run(short)
    for row, tokens in long:
        _forget_longest(module, layer_type)
        own = run(position_ids[row, tokens])
        for whole, part in zip(_tensors(found), _tensors(own), strict=True):
            whole[row, tokens] = part
    return found


def _tensors(found: Embeddings) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else found


def _limit(module: Any, kind: str, layer_type: str | None) -> int:
    """Maximum length of documents with the frequencies of short texts."""
    if "dynamic" in kind:
        return int(module.original_max_seq_len)
    settings = module.config.rope_parameters
    settings = settings if layer_type is None else settings[layer_type]
    return int(settings["original_max_position_embeddings"])


def _long_documents(positions: torch.Tensor, limit: int) -> list[tuple[slice, slice]]:
    """(row, tokens) of the documents in positions [rows, tokens] beyond the limit; none if all rows are one
    document of equal length, since one call then serves them all."""
    if positions.dim() != 2 or int(positions.max()) < limit:
        return []
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    if not begins[:, 1:].any() and bool((positions[:, -1] == positions[0, -1]).all()):
        return []
    found = []
    for row, (places, starts) in enumerate(zip(positions.tolist(), begins.tolist(), strict=True)):
        first = [token for token, start in enumerate(starts) if start]
        for start, end in zip(first, [*first[1:], len(places)], strict=True):
            if places[end - 1] >= limit:
                found.append((slice(row, row + 1), slice(start, end)))
    return found


def _forget_longest(module: Any, layer_type: str | None) -> None:
    """Reset `dynamic` to the frequencies of short texts."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = getattr(module, "original_max_seq_len", None)
    if getattr(module, f"{prefix}max_seq_len_cached", original) != original:
        now = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(now.device))
        setattr(module, f"{prefix}max_seq_len_cached", original)


@contextmanager
def _as_default(module: Any) -> Iterator[None]:
    """While open, make the module treat its frequencies as independent of length and positions."""
    kinds, settings = module.rope_type, module.config.rope_parameters
    module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    named = {key: settings[key] for key in ("rope_type",) if key in settings}
    settings.update(dict.fromkeys(named, "default"))
    try:
        yield
    finally:
        module.rope_type = kinds
        settings.update(named)
