"""Causal attention over packed documents and sliding windows, without a tokens x tokens mask.

transformers describes visible keys as a function of indices, which its `sdpa` expands to a boolean mask
[batch, 1, tokens, tokens]. If that function means "keys of the same document up to this one, within the
window", CUDA attends to all documents in one call (`model/varlen.py`). Otherwise each document is attended to
separately, in blocks if it is longer than the window. Everything else uses transformers' own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.nn.attention import SDPBackend, sdpa_kernel

from horizon_lm.model.varlen import Packed, attend_packed, fits, pack

Bounds = list[list[tuple[int, int]]]  # per row, the (start, end) of its documents
_BLOCK = 512  # minimum queries of a window's block


class IntervalMask(torch.Tensor):
    """Stands for a boolean mask [batch, 1, tokens, tokens]; holds int32 [batch, 1, 1, tokens], the first key
    that each query sees. It sees all keys from there to itself.

    Only `attend` uses the compact form. For anything else a model does with its mask (add it to scores,
    combine it with its own) it expands to the boolean mask.
    documents: as Python numbers, so that no layer has to wait for the device. window: maximum keys per query,
    if limited. packed: the documents for one call; None if the device has no kernel for it.
    """

    documents: Bounds
    window: int | None
    packed: Packed | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_written_out(args), **_written_out(kwargs or {}))


def _written_out(value: Any) -> Any:
    """Replace interval masks in the arguments by boolean masks."""
    if isinstance(value, IntervalMask):
        with torch._C.DisableTorchFunctionSubclass():
            starts = value.as_subclass(torch.Tensor)
        place = torch.arange(starts.shape[-1], device=starts.device)
        return (place[None, :] <= place[:, None]) & (place >= starts.transpose(-1, -2))
    if isinstance(value, (tuple, list)):
        return type(value)(_written_out(item) for item in value)
    if isinstance(value, dict):
        return {key: _written_out(item) for key, item in value.items()}
    return value


@contextmanager
def attention_by_intervals() -> Iterator[None]:
    """While open, models with `attn_implementation: sdpa` attend to documents and windows one by one.

    Replaces transformers' sdpa under its own name, since some models check the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    was = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]
    try:
        AttentionInterface.register("sdpa", attend)
        AttentionMaskInterface.register("sdpa", make_mask)
        yield
    finally:
        AttentionInterface.register("sdpa", was[0])
        AttentionMaskInterface.register("sdpa", was[1])


def attention_restorer() -> Callable[[], None]:
    """Return a function that restores transformers' attention after an interrupt."""
    from transformers import AttentionInterface, AttentionMaskInterface

    was = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]

    def restore() -> None:
        if was[0] is not attend:
            AttentionInterface.register("sdpa", was[0])
            AttentionMaskInterface.register("sdpa", was[1])

    return restore


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Implement transformers' mask interface: intervals if they suffice, else the mask of `sdpa`."""
    from transformers.masking_utils import sdpa_mask

    if not args and _may_be_intervals(kwargs):
        tokens, window = kwargs["q_length"], kwargs.get("local_size")
        window = None if window is None or window >= tokens else int(window)
        if detect_fake_mode() is not None:  # fake tensors: planned as one document per row
            return _planned(kwargs["batch_size"], tokens, window, kwargs.get("device", "cpu"))
        found = _find_intervals(
            kwargs["mask_function"], kwargs["batch_size"], tokens, window, kwargs.get("device", "cpu")
        )
        if found is not None:
            begins, starts = found
            documents = _bounds(begins)
            return _mask(starts, documents, window, pack(documents, starts.device))
    return sdpa_mask(*args, **kwargs)


def _may_be_intervals(given: dict[str, Any]) -> bool:
    """Whether transformers would build a square mask of tokens without padding."""
    tokens, window = given["q_length"], given.get("local_size")
    square = tokens == given["kv_length"] and not int(given.get("q_offset", 0))
    cut = window is not None and window < tokens
    needed = cut or not given.get("allow_is_causal_skip", True)
    plain = not given.get("use_vmap", False) and not given.get("allow_is_bidirectional_skip", False)
    unpadded = given.get("attention_mask") is None
    return square and not int(given.get("kv_offset", 0)) and needed and plain and unpadded


def _find_intervals(
    sees: Callable[..., torch.Tensor],
    batch: int,
    tokens: int,
    window: int | None,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (whether a token begins a document, the first key it sees), [batch, 1, 1, tokens] each; None
    unless the mask is causal, within documents and within the window.

    Asks `sees` for four keys per query: itself and the next, the first visible one and the one before.
    """
    rows = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    query = torch.arange(tokens, device=device).view(1, 1, 1, tokens).expand(batch, 1, 1, tokens)

    def visible(key: torch.Tensor) -> torch.Tensor:
        return sees(rows, heads, query, key.clamp(0, tokens - 1)).expand(batch, 1, 1, tokens)

    begins = ~visible(query - 1) | (query == 0)
    starts = torch.where(begins, query, 0).cummax(dim=-1).values
    if window is not None:
        starts = torch.maximum(starts, query - (window - 1))
    sound = visible(query) & visible(starts)
    sound &= ~visible(starts - 1) | (starts == 0)
    sound &= ~visible(query + 1) | (query == tokens - 1)
    return (begins, starts) if bool(sound.all()) else None


def _bounds(begins: torch.Tensor) -> Bounds:
    tokens = begins.shape[-1]
    found = []
    for row in begins.flatten(1).tolist():
        first = [place for place, begin in enumerate(row) if begin]
        found.append(list(zip(first, [*first[1:], tokens], strict=True)))
    return found


def _mask(
    starts: torch.Tensor, documents: Bounds, window: int | None, packed: Packed | None = None
) -> torch.Tensor:
    mask = starts.to(torch.int32)
    if type(mask) is torch.Tensor:  # fake tensors cannot be subclasses
        mask = mask.as_subclass(IntervalMask)
    mask.documents, mask.window, mask.packed = documents, window, packed  # type: ignore[attr-defined]
    return mask


def _planned(batch: int, tokens: int, window: int | None, device: torch.device | str) -> torch.Tensor:
    """The mask for fake tensors.

    Without a window, only models that read the mask themselves ask for one: an expanded view of the true
    shape, which takes no memory of its own.
    """
    if window is None:
        whole = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(batch, 1, tokens, tokens)
        whole.sees_all_before = True  # type: ignore[attr-defined]
        return whole
    starts = torch.zeros((batch, 1, 1, tokens), dtype=torch.int32, device=device)
    return _mask(starts, [[(0, tokens)]] * batch, window)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface. query: [batch, heads, tokens, size]; returns
    [batch, tokens, heads, size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if getattr(attention_mask, "sees_all_before", False):
        attention_mask = None
    bounds: Bounds | None = getattr(attention_mask, "documents", None)
    if bounds is None or kwargs.get("position_bias") is not None:
        mask = _written_out(attention_mask)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    window: int | None = attention_mask.window  # type: ignore[union-attr]
    packed: Packed | None = attention_mask.packed  # type: ignore[union-attr]
    if packed is not None and fits(module, query, key, value, packed, kwargs):
        return attend_packed(query, key, value, packed, window, kwargs.get("scaling")), None
    rows = []
    with _without_cudnn(query.device):
        for row, documents in enumerate(bounds):
            parts = []
            for queries, keys in _pieces(documents, window):
                mask = None
                if window is not None and keys.stop - keys.start > window:
                    mask = _window_mask(queries, keys, window, query.device)
                q = query[row : row + 1, :, queries]
                k, v = key[row : row + 1, :, keys], value[row : row + 1, :, keys]
                out, _ = sdpa_attention_forward(module, q, k, v, mask, **{**kwargs, "is_causal": True})
                parts.append(out)
            rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Exclude cuDNN from attention to pieces: it would plan its kernels again for each new length.

    torch's switches are process-wide; backends that the user turned off stay off.
    """
    cuda = torch.backends.cuda
    if device.type != "cuda" or not cuda.cudnn_sdp_enabled():
        return nullcontext()
    others = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
        SDPBackend.MATH: cuda.math_sdp_enabled,
    }
    chosen = [backend for backend, is_enabled in others.items() if is_enabled()]
    return sdpa_kernel(chosen) if chosen else nullcontext()


def _pieces(documents: list[tuple[int, int]], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield (queries, keys that any of them sees): whole documents, or blocks of those longer than the
    window."""
    for start, end in documents:
        if window is None or end - start <= window:
            yield slice(start, end), slice(start, end)
            continue
        block = max(window, _BLOCK)
        for first in range(start, end, block):
            last = min(first + block, end)
            yield slice(first, last), slice(max(start, first - window + 1), last)


def _window_mask(queries: slice, keys: slice, window: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, queries, keys]."""
    q = torch.arange(queries.start, queries.stop, device=device)[:, None]
    k = torch.arange(keys.start, keys.stop, device=device)[None, :]
    return ((k <= q) & (k > q - window))[None, None]
