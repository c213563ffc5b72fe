"""Packing: training sequences from documents, or from samples of them.

- `wrapped`: join all documents and cut every `max_length` tokens. The last, partial sequence is dropped in
  training and kept in evaluation.
- `bfd`: whole documents, best fit decreasing (TRL's `pack_dataset`); positions restart at 0 and attention
  stays within each document. Pairs are packed whole into sequences of 2 * `max_length`.
- `none`: one document, or one pair, per sequence.

In the last two, `truncation` decides about documents longer than `max_length`; those with pictures are
dropped. Data with pictures is not packed.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from horizon_lm.data.hf_datasets import quiet
from horizon_lm.data.rows import Left, Rows, Segments
from horizon_lm.data.tokens import TokenStore
from horizon_lm.errors import DataError
from horizon_lm.machine.libraries import before_peft

# Documents packed at once: TRL takes about 0.1 ms for each, and this many fill more than 99.9 % of each
# sequence.
_PACKED_TOGETHER = 50_000


class Layout(TypedDict):
    """How documents become sequences: parameters of `make_rows`."""

    max_length: int
    strategy: str
    truncation: str


def make_rows(
    store: TokenStore,
    documents: np.ndarray,
    *,
    max_length: int,
    strategy: str,
    truncation: str = "drop",
    keep_rest: bool = False,
) -> Rows:
    """Make sequences of `documents` (numbers of documents, or of samples, in order, may repeat). Raises
    DataError if none is left."""
    if store.kind != "documents":
        return _of_samples(store, documents, max_length, strategy, truncation)
    if strategy == "wrapped":
        return _wrapped(store, documents, max_length, keep_rest)
    starts, lengths, left = _truncated(store, documents, max_length, truncation)
    if not len(starts):
        raise DataError(
            f"no usable document: all {len(documents)} are longer than max_length={max_length}, or have "
            "nothing to train on within it",
            hint="raise max_length, or set truncation: keep_start",
        )
    if strategy == "bfd":
        order, offsets = _best_fit(lengths, max_length)
        starts, lengths = starts[order], lengths[order]
    else:
        offsets = np.arange(len(starts) + 1)
    return Rows(store, starts, lengths, offsets, max_length, strategy, left)


def _wrapped(store: TokenStore, documents: np.ndarray, max_length: int, keep_rest: bool) -> Rows:
    lengths = store.lengths[documents]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    num_rows = total // max_length + (1 if keep_rest and total % max_length > 1 else 0)
    if num_rows == 0:
        raise DataError(
            f"the data holds {total} tokens, less than one sequence of {max_length}",
            hint=f"add text, or set max_length={total}" if total > 1 else "add text",
        )
    used = min(total, num_rows * max_length)
    cuts = np.arange(0, used, max_length)
    begins = np.union1d(cuts, (ends - lengths)[ends - lengths < used])  # positions in the joined documents
    owner = np.searchsorted(ends, begins, side="right")
    starts = store.starts[documents][owner] + begins - (ends - lengths)[owner]
    segment_lengths = np.diff(np.append(begins, used))
    offsets = np.append(np.searchsorted(begins, cuts), len(begins))
    left = Left(tokens=total - used)
    return Rows(store, starts, segment_lengths, offsets, max_length, "wrapped", left)


def _truncated(
    store: TokenStore, documents: np.ndarray, max_length: int, truncation: str
) -> tuple[np.ndarray, np.ndarray, Left]:
    """Return (starts, lengths) of the kept pieces of documents, in order, and what was dropped."""
    starts, lengths = store.starts[documents], store.lengths[documents]
    total = int(lengths.sum())
    if store.pictures is not None:  # a cut could go through the placeholders of a picture
        kept = (lengths <= max_length) | (store.pictures.of_documents[documents] == 0)
        if not kept.all():
            starts, lengths, left = _truncated(store, documents[kept], max_length, truncation)
            gone = int((~kept).sum())
            return starts, lengths, left.more(gone, total - int(store.lengths[documents[kept]].sum()))
    is_long = lengths > max_length
    if truncation == "drop":
        starts, lengths = starts[~is_long], lengths[~is_long]
    elif truncation == "keep_start":
        lengths = np.minimum(lengths, max_length)
    elif truncation == "keep_end":
        starts = starts + np.maximum(lengths - max_length, 0)
        lengths = np.minimum(lengths, max_length)
    else:  # split
        pieces = -(-lengths // max_length)
        index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        rest = np.repeat(lengths, pieces) - index * max_length
        starts = np.repeat(starts, pieces) + index * max_length
        lengths = np.minimum(rest, max_length)
    useful = _has_target(store, starts, lengths)
    starts, lengths = starts[useful], lengths[useful]
    gone = len(documents) - len(starts) if truncation != "split" else 0
    truncated = 0 if truncation == "drop" else int(is_long.sum())
    too_long = int(is_long.sum()) if truncation == "drop" else 0
    left = Left(gone, total - int(lengths.sum()), truncated, too_long)
    return starts, lengths, left


def _of_samples(
    store: TokenStore, samples: np.ndarray, max_length: int, strategy: str, truncation: str
) -> Rows:
    cut, mismatched, left = _cut(store, samples, max_length, truncation)
    num_kept, sides = cut.lengths.shape
    if not num_kept:
        raise DataError(
            f"no usable {store.noun}: all {len(samples)} are longer than max_length={max_length}, or have "
            "nothing to train on within it",
            hint="raise max_length, or set truncation: keep_start",
        )
    order, offsets = np.arange(num_kept), np.arange(num_kept + 1)
    if strategy == "bfd":
        order, offsets = _best_fit(cut.lengths.sum(1), sides * max_length)
    starts, lengths = cut.starts[order].ravel(), cut.lengths[order].ravel()
    return Rows(store, starts, lengths, offsets * sides, max_length, strategy, left, mismatched)


def _cut(
    store: TokenStore, samples: np.ndarray, max_length: int, truncation: str
) -> tuple[Segments, Segments | None, Left]:
    """Return (trained documents [samples, sides], those of the KL term, what was dropped) of kept samples.

    drop: samples with a document longer than max_length. keep_start: cut each document, and drop samples
    whose prompt alone fills max_length, as TRL does. keep_end: cut as many tokens off the prompt of every
    side as the longest needs, and drop samples that would lose all of it. TRL cuts each side by itself; its
    two log-probabilities are then of completions that continue different texts.
    """
    sides = 2 if store.kind == "pairs" else 1
    documents = samples[:, None] * store.sides + np.arange(sides)
    starts, lengths = store.starts[documents], store.lengths[documents]
    prompts, longest = store.prompt_lengths[documents[:, 0]], lengths.max(axis=1, initial=0)
    total, is_long = int(lengths.sum()), longest > max_length
    cut = np.zeros_like(longest)
    fits = ~is_long
    if truncation == "keep_start":
        fits = prompts < max_length
    elif truncation == "keep_end":
        cut = np.where(is_long, longest - max_length, 0)
        fits = ~is_long | (cut < prompts)
    starts = starts + cut[:, None]
    lengths = np.minimum(lengths - cut[:, None], max_length)
    has_targets = (lengths > np.maximum(prompts - cut, 1)[:, None]).all(axis=1)
    is_equal = np.zeros_like(fits)
    for i in np.flatnonzero(fits & is_long) if sides == 2 else ():
        is_equal[i] = _are_equal(store, starts[i], lengths[i])
    kept = fits & has_targets & ~is_equal
    mismatched = None
    if store.kind == "labelled" and store.sides == 2:
        others = documents[:, 0] + 1
        rest = np.minimum(store.lengths[others] - cut, max_length)
        mismatched = Segments((store.starts[others] + cut)[kept], rest[kept])
    left = Left(
        documents=int((~kept).sum()),
        tokens=total - int(lengths[kept].sum()),
        truncated=int((kept & is_long).sum()),
        too_long=int((~fits).sum()) if truncation == "drop" else 0,
        full=int((~fits).sum()) if truncation != "drop" else 0,
        equal=int((fits & has_targets & is_equal).sum()),
    )
    return Segments(starts[kept], lengths[kept]), mismatched, left


def _are_equal(store: TokenStore, starts: np.ndarray, lengths: np.ndarray) -> bool:
    one, other = (store.ids[start : start + length] for start, length in zip(starts, lengths, strict=True))
    return np.array_equal(one, other)


def _has_target(store: TokenStore, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mark pieces with a token to train on; the first token of a piece is never a target."""
    if store.trained is None:
        return lengths > 1
    found = np.empty(len(starts), bool)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        found[i] = store.trained[start + 1 : start + length].any()
    return found


def _best_fit(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (order of pieces, offsets of rows in it) from TRL's best fit decreasing on piece numbers."""
    import datasets
    import pyarrow

    before_peft()
    from trl import pack_dataset

    orders, counts = [], []
    for begin in range(0, len(lengths), _PACKED_TOGETHER):
        part = lengths[begin : begin + _PACKED_TOGETHER]
        numbers = np.repeat(np.arange(begin, begin + len(part)), part)  # packed in place of tokens
        column = pyarrow.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(part)]).astype(np.int32), pyarrow.array(numbers)
        )
        dataset = datasets.Dataset(pyarrow.table({"numbers": column}))
        options = {"batch_size": len(part), "keep_in_memory": True}
        with quiet():
            # TRL builds a tree with a leaf per length: keep it small where all pieces fit into one row.
            room = min(max_length, int(part.sum()))
            packed = pack_dataset(dataset, room, "bfd", options).data.table
        sequences = packed["seq_lengths"].combine_chunks()
        piece_lengths = sequences.flatten().to_numpy()
        values = packed["numbers"].combine_chunks().flatten().to_numpy()
        orders.append(values[np.cumsum(piece_lengths) - piece_lengths])
        counts.append(sequences.value_lengths().to_numpy())
    return np.concatenate(orders), np.concatenate([[0], np.cumsum(np.concatenate(counts))])


def weighted(store: TokenStore, documents: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Repeat the documents, or samples, of each dataset `weight` times: whole copies, and a seeded part.

    Keeps the order of the data; copies of a document are a whole dataset apart.
    """
    if all(weight == 1 for weight in weights):
        return documents
    parts = []
    datasets = store.datasets[documents * store.sides]
    for number, weight in enumerate(weights):
        own = documents[datasets == number]
        parts += [own] * int(weight)
        count = round((weight - int(weight)) * len(own))
        chosen = np.random.default_rng([seed, number]).permutation(len(own))[:count]
        parts.append(own[np.sort(chosen)])
    return np.concatenate(parts)


def split_off(
    num_documents: int, size: float, seed: int, noun: str = "document"
) -> tuple[np.ndarray, np.ndarray]:
    """Split into (training, evaluation) documents, or samples, seeded; size: a share below 1, or a count."""
    count = round(size * num_documents) if size < 1 else int(size)
    if not 0 < count < num_documents:
        raise DataError(
            f"val_size={size:g} of {num_documents} {noun}s leaves {count} to evaluate on and "
            f"{num_documents - count} to train on",
            hint="add data, change val_size, or set eval_datasets",
        )
    order = np.random.default_rng([seed, 1]).permutation(num_documents)
    return np.sort(order[count:]), np.sort(order[:count])
