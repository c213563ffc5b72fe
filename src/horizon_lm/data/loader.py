"""Blocks in a seeded order, with a place that can be saved and taken up again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from horizon_lm.errors import DataError


class TokenLoader:
    """Endless steps over `blocks` [n, T]: each epoch is one seeded permutation of the rows.

    Every row comes exactly once in an epoch. The permutations follow each other without a
    gap: a step that reaches the end of one takes its last rows from the next, so that any
    number of rows serves any size of step. The place is two numbers, so resuming is exact.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int = 1,
        seed: int = 42,
    ) -> None:
        if blocks.ndim != 2 or blocks.size == 0:
            raise DataError(f"blocks must be [rows, tokens] and not empty, not {list(blocks.shape)}")
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ValueError(f"batch sizes must be positive: {micro_batch_size}, {micro_batches_per_step}")
        self._blocks = blocks
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._seed = seed
        self._epoch = 0
        self._position = 0  # rows of this epoch already given out
        self._order = self._permutation(0)

    @property
    def rows_per_step(self) -> int:
        """Sequences in one step, over all its micro-batches."""
        return self._micro_batch_size * self._micro_batches_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step, over all its micro-batches."""
        return self.rows_per_step * self._blocks.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen at least once."""
        return -(-len(self._blocks) // self.rows_per_step)

    @property
    def epoch(self) -> float:
        """Epochs given out so far, as a number that grows with each step."""
        return self._epoch + self._position / len(self._blocks)

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of the next step: dicts of input_ids and labels, int64 [B, T].

        Labels are aligned with the inputs, as transformers wants them; the model shifts.
        """
        rows = self._take(self.rows_per_step).reshape(self._micro_batches_per_step, -1)
        step = []
        for micro_batch in rows:
            ids = torch.from_numpy(self._blocks[micro_batch].astype(np.int64))
            step.append({"input_ids": ids, "labels": ids.clone()})
        return step

    def state_dict(self) -> dict[str, int]:
        """The place, and what it is a place in; JSON-ready."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "rows": len(self._blocks),
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises `DataError` if the data is not what it was then."""
        now = (len(self._blocks), self._checksum)
        if (state["rows"], state["checksum"]) != now:
            raise DataError(
                f"the data has changed since this state was saved: {state['rows']} rows then, {now[0]} now",
                hint="restore the data and the tokenizer, or start a new run",
            )
        self._seed = int(state["seed"])
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._permutation(self._epoch)

    @cached_property
    def _checksum(self) -> int:
        """Of the tokens and of the first epoch's order, which NumPy may change with a version."""
        order = np.random.default_rng([0, 0]).permutation(len(self._blocks))
        return zlib.crc32(order.tobytes(), zlib.crc32(np.ascontiguousarray(self._blocks).data))

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._blocks))

    def _take(self, count: int) -> np.ndarray:
        """The next `count` row numbers, over as many epochs as that needs."""
        parts = []
        while count > 0:
            part = self._order[self._position : self._position + count]
            parts.append(part)
            count -= len(part)
            self._position += len(part)
            if self._position == len(self._blocks):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
        return np.concatenate(parts)
