"""What of the data is trained on, and what is left out and why, in figures and in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from horizon_lm.data.packing import Rows
from horizon_lm.words import count

WARN_ABOVE = 0.05  # of the documents


@dataclass(frozen=True)
class Used:
    """What the sequences hold. documents: of each dataset, each once; tokens, trained: in one epoch."""

    documents: list[int]
    tokens: int
    trained: int


@dataclass(frozen=True)
class Remark:
    """Something that was left out or cut. is_warning: more than `WARN_ABOVE` of the documents."""

    text: str
    hint: str
    is_warning: bool

    def __str__(self) -> str:
        return f"{self.text}; {self.hint}"


def used(rows: Rows) -> Used:
    """Count what is in the sequences."""
    store = rows.store
    owners = np.unique(np.searchsorted(store.starts, rows.starts, side="right") - 1)
    documents = np.bincount(store.datasets[owners], minlength=len(store.counts.formats))
    trained = rows.num_tokens
    if store.trained is not None:
        ends = rows.starts + rows.segment_lengths
        trained = sum(
            int(np.count_nonzero(store.trained[begin:end]))
            for begin, end in zip(rows.starts.tolist(), ends.tolist(), strict=True)
        )
    return Used(documents.tolist(), rows.num_tokens, trained)


def remarks(rows: Rows, *, with_bad_rows: bool = True) -> list[Remark]:
    """What to say of the data that is not in `rows`. with_bad_rows: of the rows that could not be read too,
    which all sequences of one store share."""
    left, counts = rows.left, rows.store.counts
    all_documents = len(rows.starts) + left.documents
    found = []
    if left.too_long:
        longest = int(rows.store.lengths.max())
        found.append(
            _remark(
                left.too_long,
                all_documents,
                f"longer than max_length={rows.max_length} (the longest: {count(longest, 'token')})",
                f"set max_length={1 << (longest - 1).bit_length()} to keep them, or truncation=keep_start to "
                "cut them",
            )
        )
    without = left.documents - left.too_long
    if without:
        found.append(
            _remark(
                without,
                all_documents,
                f"nothing to train on in their first {rows.max_length} tokens"
                if left.truncated
                else "nothing to train on",
                "raise max_length, or change loss_on" if left.truncated else "change loss_on, or remove them",
            )
        )
    if left.truncated:
        verb = "was" if left.truncated == 1 else "were"
        text = f"{count(left.truncated, 'document')} longer than max_length={rows.max_length} {verb} cut"
        found.append(Remark(text, f"{count(left.tokens, 'token')} are left out", False))
    if counts.num_bad and with_bad_rows:
        all_rows = counts.num_documents + counts.num_empty + counts.num_bad
        hint = "correct them; horizon data preview shows the first five"
        reason = f"bad rows, the first: {counts.bad_rows[0]}"
        found.append(_remark(counts.num_bad, all_rows, reason, hint, what="rows"))
    return found


def _remark(count: int, of: int, reason: str, hint: str, what: str = "documents") -> Remark:
    share = count / of
    text = f"{count:,} of {of:,} {what} ({share:.1%}) left out: {reason}"
    return Remark(text, hint, share > WARN_ABOVE)
