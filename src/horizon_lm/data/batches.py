"""From rows to micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from horizon_lm.config.data import IGNORED
from horizon_lm.data.packing import Row, Rows
from horizon_lm.micro_batches import MicroBatch


@dataclass(frozen=True)
class StepSize:
    """What a step is made of. tokens: without padding; positions: with it; lengths: of what attends to
    itself, for counting the FLOPs of attention."""

    tokens: int = 0
    positions: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def squares(self) -> int:
        """Sum of the squared lengths."""
        return sum(length * length for length in self.lengths)

    def __add__(self, other: StepSize) -> StepSize:
        return StepSize(
            self.tokens + other.tokens, self.positions + other.positions, self.lengths + other.lengths
        )


def collate(rows: Sequence[Row], strategy: str, pad_id: int) -> tuple[MicroBatch, StepSize]:
    """One micro-batch of `rows`: int64 [rows, longest], padded on the right with labels of -100.

    wrapped: input_ids and labels, and an attention mask if there is padding. bfd: position_ids that begin
    at 0 in every document (and in the padding, which is one more of them): transformers makes the mask that
    keeps documents apart from these, and only where no attention_mask is given. none: attention_mask.
    """
    longest = max(2, max(len(row.ids) for row in rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    labels = np.full((len(rows), longest), IGNORED, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    lengths: list[int] = []
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, row.labels, 1
        lengths += [len(row.ids)] if strategy == "wrapped" else row.lengths.tolist()
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if strategy == "bfd":
        batch["position_ids"] = torch.from_numpy(np.stack([_positions(row, longest) for row in rows]))
    elif strategy == "none" or not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask)
    return batch, StepSize(int(mask.sum()), mask.size, tuple(lengths))


def _positions(row: Row, longest: int) -> np.ndarray:
    lengths = [*row.lengths.tolist(), longest - len(row.ids)]
    return np.concatenate([np.arange(length) for length in lengths])


def in_order(rows: Rows, micro_batch_size: int, pad_id: int) -> Iterator[MicroBatch]:
    """Every row once, in order, for evaluation; the last micro-batch may be smaller."""
    for begin in range(0, len(rows), micro_batch_size):
        numbers = range(begin, min(begin + micro_batch_size, len(rows)))
        yield collate([rows.row(number) for number in numbers], rows.strategy, pad_id)[0]
