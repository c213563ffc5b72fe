"""Micro-batches from rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from horizon_lm.config.data import IGNORED
from horizon_lm.data.rows import Row, Rows
from horizon_lm.micro_batches import MicroBatch


@dataclass(frozen=True)
class StepSize:
    """Size of a step. tokens: without padding; positions: with padding; lengths: of the segments within which
    tokens attend to each other, for attention FLOPs; rows: sequences; samples: pairs or labelled samples;
    forward_lengths: of documents of the KL term, which are not trained on and count nowhere else."""

    tokens: int = 0
    positions: int = 0
    lengths: tuple[int, ...] = ()
    rows: int = 0
    samples: int = 0
    forward_lengths: tuple[int, ...] = ()

    @property
    def squares(self) -> int:
        """Sum of the squared lengths."""
        return sum(length * length for length in self.lengths)

    def __add__(self, other: StepSize) -> StepSize:
        return StepSize(
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.lengths + other.lengths,
            self.rows + other.rows,
            self.samples + other.samples,
            self.forward_lengths + other.forward_lengths,
        )


def collate(rows: Sequence[Row], strategy: str, pad_id: int) -> tuple[MicroBatch, StepSize]:
    """Make a micro-batch of `rows`: int64 [rows, longest], right-padded with labels of -100.

    wrapped: input_ids and labels, and attention_mask if there is padding. none: attention_mask too. bfd:
    position_ids that begin at 0 in every document and in the padding; transformers derives the mask that
    separates documents from these, but only without attention_mask.

    Of pairs, none gives [2 * rows, longest]: all chosen, then all rejected. Micro-batches of samples also
    have, int64 and in one order, `samples` [samples], their numbers in the store, and `documents`
    [documents, 3], the row, first position and tokens of each document, of pairs all chosen, then all
    rejected. Labelled ones have `label` [samples] of bool and, with a KL term, a micro-batch of mismatched
    documents with names that begin with `KL_`. Those of data with pictures have their features and what else
    the model takes with them: see `picture_table.Pictures.inputs`.
    """
    if rows[0].samples is None:
        return _padded(rows, strategy, pad_id)
    samples = np.concatenate([row.samples for row in rows if row.samples is not None])
    sides = sum(len(row.lengths) for row in rows) // len(samples)
    size_of_step = len(rows)
    if strategy == "none":
        rows = [piece for side in range(sides) for row in rows for piece in documents_of(row)[side::sides]]
    batch, size = _padded(rows, strategy, pad_id)
    batch["documents"] = torch.from_numpy(_documents(rows, 1 if strategy == "none" else sides))
    batch["samples"] = torch.from_numpy(samples)
    if rows[0].label is not None:
        batch["label"] = torch.tensor([bool(row.label) for row in rows])
    others = [row.mismatched for row in rows if row.mismatched is not None]
    forward: tuple[int, ...] = ()
    if others:
        more, of_others = _padded(others, strategy, pad_id)
        forward = of_others.lengths
        more["documents"] = torch.from_numpy(_documents(others, 1))
        batch |= {f"KL_{name}": value for name, value in more.items()}
    return batch, replace(size, rows=size_of_step, samples=len(samples), forward_lengths=forward)


def _padded(rows: Sequence[Row], strategy: str, pad_id: int) -> tuple[MicroBatch, StepSize]:
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
        # A row of pairs may be longer than the model's table of positions, so its padding may be too.
        limit = longest if rows[0].samples is None else max(int(row.lengths.max()) for row in rows)
        batch["position_ids"] = torch.from_numpy(np.stack([_positions(row, longest, limit) for row in rows]))
    elif strategy == "none" or not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask)
    pictures = rows[0].pictures
    if pictures is not None:
        batch |= pictures.inputs(ids, [number for row in rows for number in row.shown])
    return batch, StepSize(int(mask.sum()), mask.size, tuple(lengths), len(rows))


def _positions(row: Row, longest: int, limit: int) -> np.ndarray:
    """Count from 0 in each document and in the padding, there again after `limit` tokens."""
    padding = np.arange(longest - len(row.ids)) % limit
    return np.concatenate([*(np.arange(length) for length in row.lengths.tolist()), padding])


def documents_of(row: Row) -> list[Row]:
    """Return each document of a row, as a row of its own."""
    if len(row.lengths) == 1:
        return [row]
    ends = np.cumsum(row.lengths).tolist()
    spans = [slice(end - length, end) for end, length in zip(ends, row.lengths.tolist(), strict=True)]
    return [
        Row(row.ids[span], row.labels[span], row.lengths[i : i + 1], row.samples)
        for i, span in enumerate(spans)
    ]


def _documents(rows: Sequence[Row], sides: int) -> np.ndarray:
    """Return (row, first position, tokens) of each document, side by side of the samples."""
    places = [
        (i, end - length, length)
        for i, row in enumerate(rows)
        for end, length in zip(np.cumsum(row.lengths).tolist(), row.lengths.tolist(), strict=True)
    ]
    return np.concatenate([np.array(places, np.int64)[side::sides] for side in range(sides)])


def in_order(rows: Rows, micro_batch_size: int, pad_id: int) -> Iterator[MicroBatch]:
    """Yield every row once, in order, for evaluation; the last micro-batch may be smaller."""
    for begin in range(0, len(rows), micro_batch_size):
        numbers = range(begin, min(begin + micro_batch_size, len(rows)))
        yield collate([rows.row(number) for number in numbers], rows.strategy, pad_id)[0]
