"""Micro-batches of each step in a seeded order, with a position that can be saved and resumed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from horizon_lm.data.collate import StepSize, collate
from horizon_lm.data.rows import Rows, data_has_changed
from horizon_lm.errors import DataError
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.words import count

_STEPS_AHEAD = 2  # per worker


Step = tuple[list[MicroBatch], StepSize]


class Loader(Protocol):
    """Source of training steps.

    epoch: passes over the data so far. rows_per_step: sequences in a full step. size: of the latest step.
    crosses_epochs: see `TokenLoader`. The state is JSON-ready.
    """

    size: StepSize

    @property
    def epoch(self) -> float: ...

    @property
    def rows_per_step(self) -> int: ...

    @property
    def crosses_epochs(self) -> bool: ...

    def cut(self, micro_batch_size: int, micro_batches_per_step: int) -> None: ...

    def count_from(self, steps_done: int) -> None: ...

    def end_after(self, num_train_epochs: float, max_steps: int) -> int: ...

    def __iter__(self) -> Iterator[list[MicroBatch]]: ...

    def __next__(self) -> list[MicroBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TokenLoader:
    """Endless steps over `rows`, in one seeded permutation per epoch.

    Every row comes exactly once in an epoch, and steps do not cross epochs: the last step of an epoch takes
    the remaining rows, in fewer micro-batches, the last of which may be smaller, as in transformers. A step
    larger than the data is one epoch. The position is two numbers, so resuming is exact.

    crosses_epochs: the rule of versions before 28 November 2026, where a step at the end of an epoch takes
    its last rows from the next. Their states lack the key; a loader resumed from one keeps that rule and its
    count of steps.

    num_workers: threads that prepare steps ahead; 0: prepare each on demand. Neither order nor position
    depends on it: the position counts steps given out. Threads, because preparing a step is copying, which
    releases the GIL, and a process holding a model of hundreds of gigabytes should not fork.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int = 1,
        seed: int = 42,
        pad_id: int = 0,
        num_workers: int = 0,
    ) -> None:
        if not len(rows):
            raise DataError(
                "no sequence to train on",
                hint="run 'horizon data preview', and check max_length, truncation and loss_on",
            )
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ValueError(f"batch sizes must be positive: {micro_batch_size}, {micro_batches_per_step}")
        self._rows = rows
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._seed, self._pad_id = seed, pad_id
        self._ahead = StepsAhead(num_workers)
        self._end: int | None = None  # rows in the whole training run
        self.crosses_epochs = False
        self._counted = (0, 0)  # steps done and rows given out when steps got their present size
        self._go_to(0, 0)

    @property
    def rows_per_step(self) -> int:
        """Sequences in one full step."""
        return self._micro_batch_size * self._micro_batches_per_step

    def cut(self, micro_batch_size: int, micro_batches_per_step: int) -> None:
        """Change the size of the steps to come."""
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._go_to(*divmod(self._given, len(self._rows)))

    def count_from(self, steps_done: int) -> None:
        """Count steps from here in `end_after`: earlier ones had another size."""
        self._counted = (steps_done, self._given)

    def end_after(self, num_train_epochs: float, max_steps: int) -> int:
        """Set the end of the training run, and return its total optimizer steps.

        A positive max_steps decides. Otherwise the run takes every row once per whole epoch and, for a
        fraction, the nearest number of rows; at least one. The last step stops there.
        """
        self._end = None
        if max_steps > 0:
            return max_steps
        done, given = self._counted
        if self.crosses_epochs:
            steps = (num_train_epochs * len(self._rows) - given) / self.rows_per_step
            # keeps 0.1 * 30 from becoming 4 steps by a rounding error
            return max(1, done + max(0, math.ceil(steps - 1e-9)))
        self._end = max(1, math.floor(num_train_epochs * len(self._rows) + 0.5))
        left = max(0, self._end - given)
        to_border = min(left, -given % len(self._rows))
        epochs, rest = divmod(left - to_border, len(self._rows))
        first, whole, last = (-(-part // self.rows_per_step) for part in (to_border, len(self._rows), rest))
        return done + first + epochs * whole + last

    @property
    def epoch(self) -> float:
        """Epochs given out so far; grows with each step."""
        return self._given / len(self._rows)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """Return the micro-batches of the next step (see `collate`).

        Labels are aligned with the inputs, as in transformers; the model shifts them.
        """
        batches, self.size = self._ahead.next(self._next_job)
        self._given += self.size.rows
        return batches

    def close(self) -> None:
        """Stop the threads; no more steps can be taken."""
        self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what identifies the data."""
        epoch, position = divmod(self._given, len(self._rows))
        return {
            "made_from": self._rows.made_from,
            "epoch": epoch,
            "position": position,
            "seed": self._seed,
            "rows": len(self._rows),
            "fingerprint": self._rows.fingerprint,
            "crosses_epochs": self.crosses_epochs,
            **({"counted": list(self._counted)} if any(self._counted) else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `DataError` if the data has changed since."""
        if isinstance(state, Mapping) and state.get("fingerprint") != self._rows.fingerprint:
            raise data_has_changed(state, self._rows)
        epoch, position, seed = numbers_of(state, "epoch", "position", "seed")
        if position >= len(self._rows):
            raise not_a_place(f"position={position} of {count(len(self._rows), 'sequence')}")
        counted = state.get("counted", [0, 0])
        if not isinstance(counted, Sequence) or len(counted) != 2:
            raise not_a_place(f"counted={str(counted)[:80]}")
        steps_done, given = numbers_of({"counted[0]": counted[0], "counted[1]": counted[1]}, *_COUNTED)
        self._seed, self._counted = seed, (steps_done, given)
        self.crosses_epochs = bool(state.get("crosses_epochs", True))
        self._go_to(epoch, position)

    def _go_to(self, epoch: int, position: int) -> None:
        self._ahead.clear()
        self._given = epoch * len(self._rows) + position  # rows given out
        self._epoch, self._position = epoch, position  # of the next row to prepare
        self._order = self._permutation(epoch)
        self.size = StepSize()

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def _next_job(self) -> Callable[[], Step]:
        numbers = self._take(self._rows_of_next_step())
        return lambda: self._make(numbers)

    def _rows_of_next_step(self) -> int:
        if self.crosses_epochs:
            return self.rows_per_step
        left = len(self._rows) - self._position
        to_end = 0 if self._end is None else self._end - self._epoch * len(self._rows) - self._position
        if to_end > 0:  # after a rollback, the last steps come from beyond the end
            left = min(left, to_end)
        return min(self.rows_per_step, left)

    def _make(self, numbers: np.ndarray) -> Step:
        batches, size = [], StepSize()
        for begin in range(0, len(numbers), self._micro_batch_size):
            rows = [self._rows.row(number) for number in numbers[begin : begin + self._micro_batch_size]]
            batch, part = collate(rows, self._rows.strategy, self._pad_id)
            batches.append(batch)
            size += part
        return batches, size

    def _take(self, wanted: int) -> np.ndarray:
        """Return the next `wanted` row numbers, across epochs if needed."""
        parts = []
        while wanted > 0:
            part = self._order[self._position : self._position + wanted]
            parts.append(part)
            wanted -= len(part)
            self._position += len(part)
            if self._position == len(self._rows):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
        return np.concatenate(parts)


_COUNTED = ("counted[0]", "counted[1]")


def numbers_of(state: Mapping[str, Any], *keys: str) -> list[int]:
    """Return the counts under `keys` of a loader's state. Raises DataError for invalid ones."""
    if not isinstance(state, Mapping):
        raise not_a_place(str(state)[:80])
    for key in keys:
        value = state.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise not_a_place(f"{key}={str(value)[:80]}")
    return [int(state[key]) for key in keys]


def not_a_place(what: str) -> DataError:
    """Return the error for an invalid loader state."""
    return DataError(f"invalid saved data position: {what}", hint="resume from an earlier checkpoint")


class StepsAhead:
    """Jobs run a few ahead in threads; results keep the order of the jobs."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, "horizon-data") if num_workers else None
        self._waiting: deque[Future[Step]] = deque()

    def next(self, next_job: Callable[[], Callable[[], Step]]) -> Step:
        if self._pool is None:
            return next_job()()
        while len(self._waiting) <= self._num_workers * _STEPS_AHEAD:
            self._waiting.append(self._pool.submit(next_job()))
        return self._waiting.popleft().result()

    def close(self) -> None:
        """Stop the threads without waiting for them."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def clear(self) -> None:
        """Drop prepared steps."""
        while self._waiting:
            self._waiting.popleft().cancel()
