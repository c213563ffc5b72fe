"""Packing: training sequences (rows) as tables of segments over the token store, without copying tokens.

- `wrapped`: join all documents and cut every `max_length` tokens. The last, partial sequence is dropped in
  training and kept in evaluation.
- `bfd`: whole documents, best fit decreasing (TRL's `pack_dataset`); positions restart at 0 and attention
  stays within each document.
- `none`: one document per sequence.

In the last two, `truncation` decides about documents longer than `max_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import xxhash

from horizon_lm.config.data import IGNORED
from horizon_lm.data.hf_datasets import quiet
from horizon_lm.data.tokens import TokenStore
from horizon_lm.errors import DataError
from horizon_lm.words import count

# Documents packed at once: TRL takes about 0.1 ms for each, and this many fill more than 99.9 % of each
# sequence.
_PACKED_TOGETHER = 50_000


@dataclass(frozen=True)
class Row:
    """A training sequence: ids and labels [tokens], int64; lengths [segments] of its documents."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Left:
    """Counts of what truncation and packing dropped: documents, and tokens (including theirs).

    truncated: documents cut. too_long: those of `documents` longer than max_length.
    """

    documents: int = 0
    tokens: int = 0
    truncated: int = 0
    too_long: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences over `store`: row r has the segments offsets[r] to offsets[r + 1].

    starts, segment_lengths: [segments], in tokens of the store.
    """

    store: TokenStore
    starts: np.ndarray
    segment_lengths: np.ndarray
    offsets: np.ndarray
    max_length: int
    strategy: str
    left: Left

    @property
    def is_separate(self) -> bool:
        """Whether positions restart at 0 in each segment."""
        return self.strategy != "wrapped"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        totals = np.concatenate([[0], np.cumsum(self.segment_lengths)])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def fill(self) -> float:
        """Share of positions that hold a token, with every row padded to max_length."""
        return self.num_tokens / (len(self) * self.max_length) if len(self) else 0.0

    def row(self, number: int) -> Row:
        begin, end = self.offsets[number], self.offsets[number + 1]
        lengths = self.segment_lengths[begin:end]
        spans = [slice(s, s + n) for s, n in zip(self.starts[begin:end], lengths, strict=True)]
        ids = np.concatenate([self.store.ids[span] for span in spans]).astype(np.int64)
        labels = ids.copy()
        if self.store.trained is not None:
            labels[~np.concatenate([self.store.trained[span] for span in spans])] = IGNORED
        if self.is_separate:  # the first token of a document does not continue the previous one
            labels[np.cumsum(lengths)[:-1]] = IGNORED
        return Row(ids, labels, lengths)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows and of NumPy's permutations, which a new version may change."""
        digest = xxhash.xxh3_128(self.store.fingerprint.encode())
        for array in (self.starts, self.segment_lengths, self.offsets):
            digest.update(np.ascontiguousarray(array, np.int64).data)
        digest.update(np.random.default_rng([0, 0]).permutation(len(self)).tobytes())
        return digest.hexdigest()

    @property
    def made_from(self) -> dict[str, Any]:
        """What identifies each part of the sequences, to tell later which one changed."""
        segments = xxhash.xxh3_128()
        for array in (self.starts, self.segment_lengths, self.offsets):
            segments.update(np.ascontiguousarray(array, np.int64).data)
        counts = self.store.counts
        return {
            "documents": counts.num_documents,
            "tokens": counts.num_tokens,
            "trained_tokens": counts.num_trained,
            "files": self.store.hashes,
            "segments": segments.hexdigest(),
        }


def data_has_changed(state: Mapping[str, Any], rows: Rows) -> DataError:
    """Return the error for a loader state saved with other sequences, naming what changed.

    States of earlier versions hold only the number of sequences.
    """
    try:
        what, hint = _what_has_changed(state, rows)
    except (LookupError, TypeError, ValueError, AttributeError):
        what, hint = "the state does not say what it was made from", "resume from an earlier checkpoint"
    return DataError(f"the data has changed since this state was saved: {what}", hint=hint)


def _what_has_changed(state: Mapping[str, Any], rows: Rows) -> tuple[str, str]:
    """Return (what changed, hint)."""
    hint = "restore the data, the tokenizer and the settings of the group Data, or start a new run"
    then, now = state.get("made_from"), rows.made_from
    if then is None:
        what = f"{count(state['rows'], 'sequence')} then, {len(rows):,} now"
        if state["rows"] == len(rows):
            what = f"still {count(len(rows), 'sequence')}, but with different tokens or a different loss mask"
        if "prompt_completion" in rows.store.counts.formats:
            hint += "; with prompt_completion, an earlier version dropped the first tokens of some answers"
    elif then["files"].get("tokens.bin") != now["files"].get("tokens.bin"):
        what = "the tokens differ"
        if (then["documents"], then["tokens"]) != (now["documents"], now["tokens"]):
            what += (
                f": {then['tokens']:,} in {count(then['documents'], 'document')} then, {now['tokens']:,} in "
                f"{now['documents']:,} now"
            )
        else:
            what += f", though not in number ({now['tokens']:,} in {count(now['documents'], 'document')})"
        hint = (
            "restore the content of the data files, the tokenizer and the chat template, or start a new run"
        )
    elif then["files"].get("trained.bin") != now["files"].get("trained.bin"):
        what = (
            f"the tokens are the same, but the loss mask differs: {then['trained_tokens']:,} trained on "
            f"then, {now['trained_tokens']:,} now"
        )
        hint = "restore loss_on, the chat template and the versions of trl and horizon-lm, or start a new run"
    elif (then["files"], then["segments"]) != (now["files"], now["segments"]):
        what = (
            "the tokens are the same, but cut or packed differently: "
            f"{count(state['rows'], 'sequence')} then, {len(rows):,} now"
        )
        hint = "restore max_length, packing, truncation, weights, val_size and data_seed, or start a new run"
    else:
        what = "the order differs, because this version of numpy permutes differently"
        hint = "restore the version of numpy, or start a new run"
    return what, hint


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
    """Make sequences of `documents` (numbers, in order, may repeat). Raises DataError if none is left."""
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
    """Repeat the documents of each dataset `weight` times: whole copies, and a seeded part.

    Keeps the order of the data; copies of a document are a whole dataset apart.
    """
    if all(weight == 1 for weight in weights):
        return documents
    parts = []
    for number, weight in enumerate(weights):
        own = documents[store.datasets[documents] == number]
        parts += [own] * int(weight)
        count = round((weight - int(weight)) * len(own))
        chosen = np.random.default_rng([seed, number]).permutation(len(own))[:count]
        parts.append(own[np.sort(chosen)])
    return np.concatenate(parts)


def split_off(num_documents: int, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into (training, evaluation) documents, seeded; size: a share below 1, or a count."""
    count = round(size * num_documents) if size < 1 else int(size)
    if not 0 < count < num_documents:
        raise DataError(
            f"val_size={size:g} of {num_documents} documents leaves {count} to evaluate on and "
            f"{num_documents - count} to train on",
            hint="add data, change val_size, or set eval_datasets",
        )
    order = np.random.default_rng([seed, 1]).permutation(num_documents)
    return np.sort(order[count:]), np.sort(order[:count])
