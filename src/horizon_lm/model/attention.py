"""Attention over packed documents without a mask of tokens times tokens.

transformers describes which key a query may see as a function of indices, and has its `sdpa` turn it into
a boolean mask of [batch, 1, tokens, tokens]. Where that function means "causal, within contiguous
documents", the documents' bounds say the same, and each document is attended to by itself: no mask, and
no work on pairs that it would hide. Everything else goes through transformers' own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode

Bounds = list[list[tuple[int, int]]]  # per row the (start, end) of its documents


class DocumentMask(torch.Tensor):
    """Stands for a boolean mask of [batch, 1, tokens, tokens], and holds int32 [batch, 1, 1, tokens]: the
    first token of each token's document.

    Only `attend` looks at what it holds. To anything else that a model does with its mask (add it to
    scores, combine it with one of its own) it is the boolean mask, written out.
    bounds: documents as numbers, so that no layer has to ask the device for them.
    """

    bounds: Bounds

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_written_out(args), **_written_out(kwargs or {}))


def _written_out(value: Any) -> Any:
    """The same arguments with boolean masks in place of documents."""
    if isinstance(value, DocumentMask):
        starts = value.as_subclass(torch.Tensor)
        place = torch.arange(starts.shape[-1], device=starts.device)
        return (place[None, :] <= place[:, None]) & (place >= starts.transpose(-1, -2))
    if isinstance(value, (tuple, list)):
        return type(value)(_written_out(item) for item in value)
    if isinstance(value, dict):
        return {key: _written_out(item) for key, item in value.items()}
    return value


@contextmanager
def attention_by_documents() -> Iterator[None]:
    """While open, models with `attn_implementation: sdpa` attend to packed documents one by one.

    What transformers calls sdpa is replaced, not given another name: some models ask for the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    was = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]
    AttentionInterface.register("sdpa", attend)
    AttentionMaskInterface.register("sdpa", make_mask)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", was[0])
        AttentionMaskInterface.register("sdpa", was[1])


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Of transformers' mask interface: document bounds where they say it all, else what `sdpa` gets."""
    from transformers.masking_utils import sdpa_mask

    if not args and _may_be_documents(kwargs):
        if detect_fake_mode() is not None:  # positions without values: planned for as one document
            return None
        starts = _document_starts(
            kwargs["mask_function"], kwargs["batch_size"], kwargs["q_length"], kwargs.get("device", "cpu")
        )
        if starts is not None:
            mask = starts.as_subclass(DocumentMask)
            mask.bounds = _bounds(starts)
            return mask
    return sdpa_mask(*args, **kwargs)


def _may_be_documents(given: dict[str, Any]) -> bool:
    """A square mask that transformers would have to build, of tokens without padding."""
    square = given["q_length"] == given["kv_length"]
    offset = int(given.get("q_offset", 0)) or int(given.get("kv_offset", 0))
    needed = not given.get("allow_is_causal_skip", True) and not given.get("use_vmap", False)
    return square and not offset and needed and given.get("attention_mask") is None


def _document_starts(
    sees: Callable[..., torch.Tensor], batch: int, tokens: int, device: torch.device | str
) -> torch.Tensor | None:
    """The first token of each token's document, int32 [batch, 1, 1, tokens]; None where the mask is
    anything but causal within contiguous documents (a sliding window that cuts one, for example)."""
    rows = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    query = torch.arange(tokens, device=device).view(1, 1, 1, tokens).expand(batch, 1, 1, tokens)

    def visible(key: torch.Tensor) -> torch.Tensor:
        return sees(rows, heads, query, key.clamp(0, tokens - 1)).expand(batch, 1, 1, tokens)

    begins = ~visible(query - 1) | (query == 0)
    starts = torch.where(begins, query, 0).cummax(dim=-1).values
    sound = visible(query) & visible(starts)
    sound &= ~visible(starts - 1) | (starts == 0)
    sound &= ~visible(query + 1) | (query == tokens - 1)
    return starts.to(torch.int32) if bool(sound.all()) else None


def _bounds(starts: torch.Tensor) -> Bounds:
    tokens = starts.shape[-1]
    found = []
    for row in starts.flatten(1).tolist():
        first = sorted(set(row))
        found.append(list(zip(first, [*first[1:], tokens], strict=True)))
    return found


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Of transformers' attention interface. query: [batch, heads, tokens, size]; returns
    [batch, tokens, heads, size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, DocumentMask) or kwargs.get("position_bias") is not None:
        mask = attention_mask if attention_mask is None else _written_out(attention_mask)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    rows = []
    for row, documents in enumerate(attention_mask.bounds):
        parts = []
        for start, end in documents:
            place = (slice(row, row + 1), slice(None), slice(start, end))
            out, _ = sdpa_attention_forward(
                module, query[place], key[place], value[place], None, **{**kwargs, "is_causal": True}
            )
            parts.append(out)
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None
