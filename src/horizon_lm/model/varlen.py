"""Causal attention to all documents of a micro-batch in one call, on CUDA: `torch.nn.attention.varlen`.

Rows [batch, heads, tokens, size] become one sequence [batch * tokens, heads, size], with the indices where
documents begin. One kernel serves all lengths, so new lengths need no planning. Its backward pass is
deterministic under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from horizon_lm.memory.pinned import pinned

# Limits of torch's flash attention kernels (flash_api.cpp, sdp_utils.cpp).
_DTYPES = frozenset({torch.bfloat16, torch.float16})
_LARGEST_SIZE = 256
_NO_BACKWARD = range(193, 225)  # no backward pass on sm86, sm89 and sm120; excluded on all
_ARCHITECTURES = ((8, 0), (12, 1))
# Honoured parameters of transformers' sdpa; documents imply `is_causal`. sdpa ignores unlisted names.
_HONOURED = frozenset({"module", "query", "key", "value", "attention_mask", "scaling", "is_causal"})
_REJECTED = frozenset({"softcap", "output_attentions"})  # not listed, but sdpa raises or warns

Attend = Callable[..., torch.Tensor]


class Packed(NamedTuple):
    """The documents of all rows, one after another, and the function that attends to them.

    offsets: int32 [documents + 1] on the device: the first token of each document, and the end. longest:
    tokens of the longest document. tokens: tokens of all rows. unset: options that transformers' sdpa has and
    the function lacks; they must not be set.
    """

    offsets: torch.Tensor
    longest: int
    tokens: int
    attend: Attend
    unset: frozenset[str]


def pack(documents: Sequence[Sequence[tuple[int, int]]], device: torch.device | str) -> Packed | None:
    """Copy the documents' bounds to the device without waiting for it; None if it has no kernel for them.

    documents: per row, (start, end) of its documents, which fill rows of equal length.
    """
    device = torch.device(device)
    attend = find_varlen() if has_kernel(device) else None
    if attend is None:
        return None
    starts, end, longest = [], 0, 0
    for row in documents:
        starts += [end + start for start, _ in row]
        longest = max(longest, *(last - first for first, last in row))
        end += row[-1][1]
    offsets = torch.tensor([*starts, end], dtype=torch.int32)
    offsets = pinned(offsets, most=end + 1)  # at most as many documents as tokens
    return Packed(offsets.to(device, non_blocking=True), longest, end, attend, _unknown_options())


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether torch's flash attention runs on the device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    lowest, highest = _ARCHITECTURES
    return lowest <= torch.cuda.get_device_capability(device) <= highest


@cache
def find_varlen() -> Attend | None:
    """Return torch's function; None if this torch has none with windows and scaling (before 2.11).

    torch 2.11 groups heads by default (its kernel reads the number of key heads); later versions require
    `enable_gqa`. Imported on first use, since the import loads torch's compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt(varlen_attn)


def adapt(function: Callable[..., Any]) -> Attend | None:
    """Return a function (query, key, value, offsets, offsets, longest, longest, *, scale, window_size) that
    groups heads, from any version of torch's function; None if it takes no window or scale."""
    names = inspect.signature(function).parameters.keys()
    if not {"scale", "window_size"} <= names:
        return None
    return partial(function, enable_gqa=True) if "enable_gqa" in names else function


def fits(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    options: Mapping[str, Any],
) -> bool:
    """Whether the kernel computes what transformers' sdpa would for this call.

    query: [batch, heads, tokens, size]. options: keyword arguments of the attention interface.
    """
    batch, heads, tokens, size = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    same = key.shape == value.shape == (batch, heads // groups, tokens, size) and heads % groups == 0
    dtypes = query.dtype in _DTYPES and query.dtype == key.dtype == value.dtype
    sizes = size % 8 == 0 and size <= _LARGEST_SIZE and size not in _NO_BACKWARD
    plain = all(_is_unset(options.get(name)) for name in packed.unset)
    return same and dtypes and sizes and plain and packed.tokens == batch * tokens


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and not value)


@cache
def _unknown_options() -> frozenset[str]:
    """Return the options that this version of transformers' sdpa reads and torch's function lacks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parameters = inspect.signature(sdpa_attention_forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return (frozenset(named) | _REJECTED) - _HONOURED


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attend to all documents at once; returns [batch, tokens, heads, size].

    window: maximum keys per query, itself included, so a query sees `window - 1` keys to its left.
    """
    batch, heads, tokens, size = query.shape
    reach = -1 if window is None or window >= packed.longest else window - 1
    out = packed.attend(
        _one_sequence(query),
        _one_sequence(key),
        _one_sequence(value),
        packed.offsets,
        packed.offsets,
        packed.longest,
        packed.longest,
        scale=scaling,
        window_size=(reach, 0),
    )
    return out.view(batch, tokens, heads, size)


def _one_sequence(rows: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, size] as [batch * tokens, heads, size]; a view if the memory layout allows."""
    flat = rows.transpose(1, 2).flatten(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
