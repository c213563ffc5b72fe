"""Streaming: tokenise during training, for data too large to tokenise first.

A stream is read in windows of `buffer_size` documents, packed together; sequences are shuffled by seed, epoch
and window, files by seed and epoch. No random state crosses windows: a position is the number of documents
before the window and of sequences taken from it, from which the window is rebuilt. (The shuffle buffer of
`datasets` is not part of its state: resuming loses its content.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from horizon_lm.config import DatasetConfig
from horizon_lm.data.collate import StepSize, collate
from horizon_lm.data.documents import Documents, Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.examples import Chat, Pair
from horizon_lm.data.loader import not_a_place, numbers_of
from horizon_lm.data.packing import Layout, make_rows
from horizon_lm.data.rows import Rows
from horizon_lm.data.sources import ShardOrder
from horizon_lm.data.tokens import TokenStore, TokenWriter, batches
from horizon_lm.errors import DataError
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.words import count


@dataclass(frozen=True)
class _Window:
    """Sequences of up to `buffer_size` documents; next_document 0: the epoch ends here."""

    epoch: int
    document: int
    next_document: int
    rows: Rows | None
    order: np.ndarray

    @property
    def following(self) -> tuple[int, int]:
        return (self.epoch, self.next_document) if self.next_document else (self.epoch + 1, 0)


@dataclass(frozen=True)
class Stream:
    """The data of a stream, and how windows become sequences. layout: of the tokens of a window."""

    datasets: Sequence[DatasetConfig]
    encoder: Encoder
    layout: Callable[[TokenStore], Layout]
    buffer_size: int
    max_bytes: int | None = None
    on_bad_row: str = "raise"

    def documents(self, shards: ShardOrder) -> Documents:
        return Documents(self.datasets, self.max_bytes, on_bad_row=self.on_bad_row, shards=shards)


class StreamLoader:
    """Endless steps over a stream, with the interface and the epochs of `TokenLoader`.

    num_workers: if positive, a thread prepares the next window; the order does not depend on it.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int = 1,
        seed: int = 42,
        pad_id: int = 0,
        num_workers: int = 0,
    ) -> None:
        self._stream, self._encoder = stream, stream.encoder
        self._seed, self._pad_id = seed, pad_id
        self._shape = (micro_batches_per_step, micro_batch_size)
        self._pool = ThreadPoolExecutor(1, "horizon-data") if num_workers else None
        self._ahead: Future[_Window] | None = None
        self._source: tuple[int, int, Documents, Iterator[Placed]] | None = None
        self.num_bad = 0
        self.crosses_epochs = False
        self.size = StepSize()
        self._position = 0  # rows taken from the window
        self._window = self._made(0, 0)

    @property
    def rows_per_step(self) -> int:
        return self._shape[0] * self._shape[1]

    def cut(self, micro_batch_size: int, micro_batches_per_step: int) -> None:
        """Change the size of the steps to come."""
        self._shape = (micro_batches_per_step, micro_batch_size)

    @property
    def epoch(self) -> float:
        """Whole passes over the data; the fraction is unknown in a stream."""
        return float(self._window.epoch + self._is_at_end)

    @property
    def _is_at_end(self) -> bool:
        """Whether the last window of the epoch is known to be used up."""
        used_up = self._position == len(self._window.order)
        return used_up and not self._window.next_document and not self.crosses_epochs

    def count_from(self, steps_done: int) -> None:
        """Do nothing: the number of steps is given."""

    def end_after(self, num_train_epochs: float, max_steps: int) -> int:
        """Return the optimizer steps of the training run: a stream's length is unknown."""
        return max_steps

    @property
    def first_rows(self) -> Rows:
        """Sequences of the present window, for a preview."""
        assert self._window.rows is not None
        return self._window.rows

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        made, size = [], StepSize()
        taken = self._take()
        for begin in range(0, len(taken), self._shape[1]):
            rows = [rows.row(number) for rows, number in taken[begin : begin + self._shape[1]]]
            batch, part = collate(rows, taken[begin][0].strategy, self._pad_id)
            made.append(batch)
            size += part
        self.size = size
        return made

    def _take(self) -> list[tuple[Rows, int]]:
        """Take the rows of the next step: fewer at the end of an epoch."""
        taken = [self._next_row()]
        epoch = self._window.epoch
        while len(taken) < self.rows_per_step and not self._is_at_end:
            self._enter_next_window()  # of a later epoch if the rest of this one has no rows
            if self._window.epoch != epoch and not self.crosses_epochs:
                break
            taken.append(self._next_row())
        return taken

    def state_dict(self) -> dict[str, Any]:
        place = (self._window.epoch, self._window.document, self._position)
        epoch, document, position = (self._window.epoch + 1, 0, 0) if self._is_at_end else place
        return {
            "epoch": epoch,
            "document": document,
            "position": position,
            "seed": self._seed,
            "buffer_size": self._stream.buffer_size,
            "encoder": self._encoder.key(),
            "crosses_epochs": self.crosses_epochs,
            **({} if self._is_at_end else {"window": self._content}),
        }

    @property
    def _content(self) -> str | None:
        """Hash of the tokens in the present window."""
        return self._window.rows.store.fingerprint if self._window.rows is not None else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, reading, not tokenising, up to its window."""
        (buffer_size,) = numbers_of(state, "buffer_size")
        if buffer_size != self._stream.buffer_size:
            raise DataError(
                f"the stream position was saved with buffer_size={buffer_size}, not "
                f"{self._stream.buffer_size}",
                hint=f"set buffer_size={buffer_size}, or start a new run",
            )
        keys, saved = (self._encoder.key(), self._encoder.key(by_name=True)), state.get("encoder")
        if saved not in keys and not self._is_of_before(saved):
            raise DataError(
                "the stream position was saved with another tokenizer, chat template, loss_on or version of "
                "trl, or by a version of Horizon-LM that trained on other tokens of prompt and completion",
                hint="restore the settings and versions, or start a new run",
            )
        if self._ahead is not None:
            self._ahead.exception()  # wait: it reads the same stream
        epoch, document, position, seed = numbers_of(state, "epoch", "document", "position", "seed")
        self._seed = seed
        self.crosses_epochs = bool(state.get("crosses_epochs", True))
        self._source = self._ahead = None
        self._window = self._made(epoch, document)
        self._check_window(state, document, position)
        self._position = position

    def _check_window(self, state: Mapping[str, Any], document: int, position: int) -> None:
        """Raise DataError if the window differs from the saved one. States of earlier versions, and those at
        the end of an epoch, do not describe it."""
        if "window" in state and (self._window.document, self._content) != (document, state["window"]):
            raise DataError(
                f"the data has changed since this state was saved: the stream differs from document "
                f"{document:,} on",
                hint="restore the content of the data files, or start a new run",
            )
        if position > len(self._window.order):
            raise not_a_place(f"position={position} of {count(len(self._window.order), 'sequence')}")

    def close(self) -> None:
        """Stop the thread; no more steps can be taken."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _enter_next_window(self) -> None:
        """Once the present window is used up, go to the next one with rows."""
        while self._window.rows is None or self._position == len(self._window.order):
            ahead, self._ahead = self._ahead, None
            self._window = ahead.result() if ahead is not None else self._made(*self._window.following)
            self._position = 0

    def _next_row(self) -> tuple[Rows, int]:
        self._enter_next_window()
        if self._pool is not None and self._ahead is None:
            self._ahead = self._pool.submit(self._made, *self._window.following)
        self._position += 1
        assert self._window.rows is not None
        return self._window.rows, int(self._window.order[self._position - 1])

    def _made(self, epoch: int, document: int) -> _Window:
        """Read the first window with rows from a document of an epoch on."""
        last_epoch = epoch + 1  # a whole pass, wherever it began
        while True:
            window = self._read(epoch, document)
            if window.rows is not None:
                return window
            epoch, document = window.following
            if epoch > last_epoch:
                raise DataError("the stream has nothing to train on", hint="run 'horizon data preview'")

    def _read(self, epoch: int, document: int) -> _Window:
        documents, source = self._at(epoch, document)
        placed = list(islice(source, self._stream.buffer_size))
        peeked = next(source, None)
        following = document + len(placed) if peeked is not None else 0
        if peeked is not None:
            self._source = (epoch, following, documents, _with_first(peeked, source))
        rows = self._rows(placed, documents)
        num_rows = len(rows) if rows is not None else 0
        order = np.random.default_rng([self._seed, epoch, document]).permutation(num_rows)
        return _Window(epoch, document, following, rows, order)

    def _at(self, epoch: int, document: int) -> tuple[Documents, Iterator[Placed]]:
        """Return the stream of an epoch from a document on: the open one, or a new one."""
        source, self._source = self._source, None
        if source is not None and source[:2] == (epoch, document):
            return source[2], source[3]
        shards = ShardOrder(self._seed, epoch)
        documents = self._stream.documents(shards)
        return documents, islice(iter(documents), document, None)

    def _is_of_before(self, key: Any) -> bool:
        """Return whether `key` is an earlier version's, which differs for pairs only, and there are none."""
        if key != self._encoder.key(1, by_name=True):
            return False
        for dataset in self._stream.datasets:
            first = next(iter(Documents([dataset], on_bad_row=self._stream.on_bad_row))).example
            if isinstance(first, Pair) or isinstance(first, Chat) and first.num_prompt:
                return False
        return True

    def _rows(self, placed: list[Placed], documents: Documents) -> Rows | None:
        with TokenWriter(None, self._encoder.dtype) as writer:
            num_documents = 0
            for batch in batches(placed):
                usable = []
                for result in self._encoder.encode(batch):
                    if isinstance(result, Encoded):
                        usable.append(result)
                    else:
                        documents.skip(result)
                writer.add(usable)
                num_documents += len(usable)
            store = writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=documents.formats)
        self.num_bad = documents.num_bad
        if not num_documents:
            return None
        try:
            return make_rows(store, np.arange(num_documents), keep_rest=True, **self._stream.layout(store))
        except DataError:  # nothing usable in this window
            return None


def _with_first(first: Placed, rest: Iterator[Placed]) -> Iterator[Placed]:
    yield first
    yield from rest
