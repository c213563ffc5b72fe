"""Numbered documents, packed into rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import horizon_lm as hz
from horizon_lm.data.encode import Encoded
from horizon_lm.data.packing import make_rows
from horizon_lm.data.rows import Rows
from horizon_lm.data.tokens import TokenStore, TokenWriter

Document = tuple[list[int], list[bool] | None]


def store_of(documents: Sequence[Document], dtype: Any = np.uint16) -> TokenStore:
    with TokenWriter(None, np.dtype(dtype)) as writer:
        for ids, trained in documents:
            mask = None if trained is None else np.array(trained, bool)
            writer.add([Encoded(np.array(ids, dtype), mask, "here", 0, trained is None)])
        return writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=["text"])


def rows_of(documents: Sequence[Document], strategy: str, max_length: int, **options: Any) -> Rows:
    store = store_of(documents)
    return make_rows(store, np.arange(len(documents)), strategy=strategy, max_length=max_length, **options)


def numbered(lengths: Sequence[int], masked: bool = False) -> list[Document]:
    """Documents of unlike tokens, so that each can be told from where it came."""
    documents, at = [], 1
    for length in lengths:
        ids = list(range(at, at + length))
        documents.append((ids, [i % 2 == 1 for i in range(length)] if masked else None))
        at += length
    return documents


LENGTHS = [7, 12, 3, 9, 2, 16, 5]


def gradients(
    model: hz.HostModel, batches: list[dict[str, torch.Tensor]]
) -> tuple[float, int, dict[str, torch.Tensor]]:
    out = model.forward_backward(batches)
    return out.loss, out.num_tokens, {name: grad.float().clone() for name, grad in model.named_gradients()}


def documents_for(vocabulary: int) -> list[Document]:
    rng = np.random.default_rng(3)
    return [(rng.integers(0, vocabulary, n).tolist(), (rng.random(n) < 0.7).tolist()) for n in LENGTHS]
