"""CUDA's flash attention for documents on the CPU: the two aten kernels behind `varlen_attn`.

All above them (the custom operator, its autograd, its saved tensors) is torch's own. The stand-ins check
their arguments as flash_api.cpp does, and what it leaves unchecked (wrong bounds give wrong numbers there).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from horizon_lm.model import varlen

aten = torch.ops.aten
_NOTHING = -1  # an unlimited side of a window


@dataclass
class Flash:
    """forwards, backwards: (left, right) of the window of each call."""

    forwards: list[tuple[int, int]] = field(default_factory=list)
    backwards: list[tuple[int, int]] = field(default_factory=list)
    dtypes: frozenset[torch.dtype] = varlen._DTYPES

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        offsets, _, longest, _, dropout, is_causal, debug = args
        self._check(query, key, value, *args[:4], dropout=dropout)
        assert not debug
        window = _window(is_causal, longest, kwargs)
        self.forwards.append(window)
        out = torch.empty_like(query)
        logsumexp = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
        for place, mask in _documents(offsets, window):
            q, k, v = (_heads(t[place], query.shape[1]) for t in (query, key, value))
            one, sums = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask is None, attn_mask=_added(mask, q), scale=kwargs.get("scale")
            )
            out[place], logsumexp[:, place] = one[0].transpose(0, 1), sums[0]
        state = torch.empty(2, dtype=torch.uint64)
        return out, logsumexp, state, torch.empty((), dtype=torch.uint64), torch.empty(0)

    def backward(
        self, grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        offsets, _, longest, _, dropout, is_causal, _, _ = args
        self._check(query, key, value, *args[:4], dropout=dropout)
        assert grad.shape == out.shape == query.shape and grad.dtype == out.dtype == query.dtype
        assert out.stride(-1) == 1 and sums.shape == (query.shape[1], query.shape[0])
        window = _window(is_causal, longest, kwargs)
        self.backwards.append(window)
        found = [torch.empty_like(t) for t in (query, key, value)]
        for place, mask in _documents(offsets, window):
            q, k, v = (_heads(t[place], query.shape[1]) for t in (query, key, value))
            one = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads(grad[place], query.shape[1]), q, k, v, _heads(out[place], query.shape[1])),
                *(sums[None, :, place], 0.0, mask is None),
                attn_mask=_added(mask, q),
                scale=kwargs.get("scale"),
            )
            for gradient, whole in zip(one, found, strict=True):
                by_group = gradient.view(1, whole.shape[1], -1, *gradient.shape[2:]).sum(2)
                whole[place] = by_group[0].transpose(0, 1)
        return tuple(found)

    def _check(self, q: Any, k: Any, v: Any, *bounds: Any, dropout: float) -> None:
        starts, key_starts, longest, longest_key = bounds
        assert q.dtype in self.dtypes and q.dtype == k.dtype == v.dtype
        assert starts.dtype == key_starts.dtype == torch.int32
        assert {t.device for t in (q, k, v, starts, key_starts)} == {q.device}
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert starts.is_contiguous() and key_starts.is_contiguous() and starts.shape == key_starts.shape
        tokens, heads, size = q.shape
        assert size % 8 == 0 and size <= 256 and heads % k.shape[1] == 0 and dropout == 0
        assert k.shape == v.shape == (tokens, k.shape[1], size)
        # unchecked by the kernel
        lengths = starts.diff()
        assert torch.equal(starts, key_starts) and int(starts[0]) == 0 and int(starts[-1]) == tokens
        assert bool((lengths > 0).all()) and longest == longest_key == int(lengths.max())


def _window(is_causal: bool, longest: int, options: dict[str, Any]) -> tuple[int, int]:
    """(left, right), as mha_varlen_fwd and set_params_fprop read them."""
    left, right = options["window_size_left"], options["window_size_right"]
    right = 0 if is_causal else right
    return _NOTHING if left >= longest else left, _NOTHING if right >= longest else right


def _documents(offsets: torch.Tensor, window: tuple[int, int]) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield (tokens, visible keys per query) of each document; None for causal."""
    left, right = window
    bounds = offsets.tolist()
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        place = torch.arange(last - first)
        apart = place[None, :] - place[:, None]  # of a key to the right of a query
        mask = torch.ones_like(apart, dtype=torch.bool)
        mask &= (apart <= right) | torch.tensor(right == _NOTHING)
        mask &= (apart >= -left) | torch.tensor(left == _NOTHING)
        yield slice(first, last), None if window == (_NOTHING, 0) else mask


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[tokens, heads or groups, size] as [1, heads, tokens, size]."""
    return rows.transpose(0, 1)[None].repeat_interleave(heads // rows.shape[1], dim=1)


def _added(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=like.dtype).masked_fill(~mask, -torch.inf)


@contextmanager
def flash_on_the_cpu() -> Iterator[Flash]:
    """While open, the CPU is a device with a kernel for documents, which also takes fp32."""
    flash = Flash(dtypes=varlen._DTYPES | {torch.float32})
    library = torch.library.Library("aten", "IMPL")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "has_kernel", lambda device: True)
        patch.setattr(varlen, "_DTYPES", flash.dtypes)
        library.impl("_flash_attention_forward", flash.forward, "CPU")
        library.impl("_flash_attention_backward", flash.backward, "CPU")
        try:
            yield flash
        finally:
            library._destroy()
