"""Rows of numbered tokens, and loaders of them."""

from __future__ import annotations

from horizon_lm.data import TokenLoader
from horizon_lm.data.rows import Rows
from packed_rows import numbered, rows_of


def make_rows(lengths: list[int], strategy: str) -> Rows:
    return rows_of(numbered(lengths), strategy, 9, keep_rest=True)


def loader_of(rows: Rows, micro_batch: int, micro_batches: int, seed: int, workers: int = 0) -> TokenLoader:
    return TokenLoader(
        rows,
        micro_batch_size=micro_batch,
        micro_batches_per_step=micro_batches,
        seed=seed,
        pad_id=0,
        num_workers=workers,
    )
