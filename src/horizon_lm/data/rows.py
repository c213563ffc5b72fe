"""Training sequences (rows): tables of segments over the token store, without copying tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from horizon_lm.config.data import IGNORED
from horizon_lm.data.picture_table import Pictures
from horizon_lm.data.tokens import TokenStore
from horizon_lm.errors import DataError
from horizon_lm.words import count


@dataclass(frozen=True)
class Segments:
    """Pieces of documents. starts, lengths: [segments], in tokens of the store."""

    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Row:
    """A training sequence: ids and labels [tokens], int64; lengths [segments] of its documents.

    Of samples also: samples, their numbers in the store; label (labelled samples); mismatched, the document
    of the KL term. A pair has two documents, chosen and rejected. Of data with pictures: shown, the numbers
    in `pictures` of its own, in the order of their placeholders.
    """

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    samples: np.ndarray | None = None
    label: bool | None = None
    mismatched: Row | None = None
    shown: tuple[int, ...] = ()
    pictures: Pictures | None = None


@dataclass(frozen=True)
class Left:
    """Counts of what truncation and packing dropped: documents (samples), and tokens (including theirs).

    truncated: documents cut. too_long: those of `documents` longer than max_length. full: samples of
    `documents` whose prompt, or one completion, fills max_length. equal: pairs of `documents` whose sides are
    equal once cut.
    """

    documents: int = 0
    tokens: int = 0
    truncated: int = 0
    too_long: int = 0
    full: int = 0
    equal: int = 0

    def more(self, too_long: int, tokens: int) -> Left:
        """Add documents that were dropped for their length."""
        return replace(
            self,
            documents=self.documents + too_long,
            tokens=self.tokens + tokens,
            too_long=self.too_long + too_long,
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences over `store`: row r has the segments offsets[r] to offsets[r + 1].

    starts, segment_lengths: [segments], in tokens of the store. mismatched: of each labelled sample, the
    document of the KL term.
    """

    store: TokenStore
    starts: np.ndarray
    segment_lengths: np.ndarray
    offsets: np.ndarray
    max_length: int
    strategy: str
    left: Left
    mismatched: Segments | None = None

    @property
    def is_separate(self) -> bool:
        """Whether positions restart at 0 in each segment."""
        return self.strategy != "wrapped"

    @property
    def sides(self) -> int:
        """Segments of a sample: 2 of a pair."""
        return 2 if self.store.kind == "pairs" else 1

    @property
    def num_positions(self) -> int:
        """Longest possible row: max_length limits each side of a pair."""
        return self.sides * self.max_length

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        totals = np.concatenate([[0], np.cumsum(self.segment_lengths)])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]

    @cached_property
    def samples(self) -> np.ndarray:
        """Numbers in the store of all samples, in the order of the rows."""
        documents = np.searchsorted(self.store.starts, self.starts[:: self.sides], side="right") - 1
        return documents // self.store.sides

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def shown(self) -> np.ndarray:
        """Numbers of all pictures in the sequences, in order; they may repeat."""
        if self.store.pictures is None:
            return np.empty(0, np.int64)
        return self.store.pictures.in_documents(self.samples)

    @property
    def fill(self) -> float:
        """Share of positions that hold a token, with every row padded to its longest length."""
        return self.num_tokens / (len(self) * self.num_positions) if len(self) else 0.0

    def row(self, number: int) -> Row:
        begin, end = self.offsets[number], self.offsets[number + 1]
        lengths = self.segment_lengths[begin:end]
        ids, labels = self._tokens(self.starts[begin:end], lengths)
        pictures = self.store.pictures
        if pictures is not None:
            documents = np.searchsorted(self.store.starts, self.starts[begin:end], side="right") - 1
            shown = tuple(pictures.in_documents(documents).tolist())
            return Row(ids, labels, lengths, shown=shown, pictures=pictures)
        if self.store.kind == "documents":
            return Row(ids, labels, lengths)
        samples = self.samples[begin // self.sides : end // self.sides]
        label = None if self.store.labels is None else bool(self.store.labels[samples[0]])
        mismatched = None
        if self.mismatched is not None:
            other = self.mismatched.lengths[begin:end]
            mismatched = Row(*self._tokens(self.mismatched.starts[begin:end], other), other)
        return Row(ids, labels, lengths, samples, label, mismatched)

    def _tokens(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, labels) of segments, one after the other."""
        spans = [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        ids = np.concatenate([self.store.ids[span] for span in spans]).astype(np.int64)
        labels = ids.copy()
        if self.store.trained is not None:
            labels[~np.concatenate([self.store.trained[span] for span in spans])] = IGNORED
        if self.store.kind != "documents":  # nothing predicts a first token, in whichever row it stands
            labels[np.cumsum(lengths) - lengths] = IGNORED
        elif self.is_separate:  # the first token of a document does not continue the previous one
            labels[np.cumsum(lengths)[:-1]] = IGNORED
        return ids, labels

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows and of NumPy's permutations, which a new version may change."""
        digest = xxhash.xxh3_128(self.store.fingerprint.encode())
        for array in self._arrays():
            digest.update(np.ascontiguousarray(array, np.int64).data)
        digest.update(np.random.default_rng([0, 0]).permutation(len(self)).tobytes())
        return digest.hexdigest()

    def _arrays(self) -> tuple[np.ndarray, ...]:
        more = () if self.mismatched is None else (self.mismatched.starts, self.mismatched.lengths)
        return (self.starts, self.segment_lengths, self.offsets, *more)

    @property
    def made_from(self) -> dict[str, Any]:
        """What identifies each part of the sequences, to tell later which one changed."""
        segments = xxhash.xxh3_128()
        for array in self._arrays():
            segments.update(np.ascontiguousarray(array, np.int64).data)
        counts = self.store.counts
        return {
            "documents": counts.num_documents,
            "tokens": counts.num_tokens,
            "trained_tokens": counts.num_trained,
            "files": self.store.hashes,
            "segments": segments.hexdigest(),
        }


_OF_PICTURES = ("pictures.bin", "shown.bin")


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
    elif [then["files"].get(n) for n in _OF_PICTURES] != [now["files"].get(n) for n in _OF_PICTURES]:
        what, hint = (
            "the tokens are the same, but the pictures differ",
            "restore their files, or start a new run",
        )
    elif then["files"].get("labels.bin") != now["files"].get("labels.bin"):
        what, hint = (
            "the tokens are the same, but the labels of samples differ",
            "restore the data files, or start a new run",
        )
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
