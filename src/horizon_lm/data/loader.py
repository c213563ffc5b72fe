"""Steps of micro-batches in a seeded order, with a place that can be saved and taken up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from horizon_lm.data.batches import MicroBatch, StepSize, collate
from horizon_lm.data.packing import Rows, data_has_changed
from horizon_lm.errors import DataError

Step = tuple[list[MicroBatch], StepSize]
_STEPS_AHEAD = 2  # for each worker


class Loader(Protocol):
    """What the training loop takes its steps from.

    epoch: passes over the data so far. rows_per_step: sequences in a step. size: of the latest step.
    The state is JSON-ready.
    """

    size: StepSize

    @property
    def epoch(self) -> float: ...

    @property
    def rows_per_step(self) -> int: ...

    def __iter__(self) -> Iterator[list[MicroBatch]]: ...

    def __next__(self) -> list[MicroBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TokenLoader:
    """Endless steps over `rows`: each epoch is one seeded permutation of them.

    Every row comes exactly once in an epoch. The permutations follow each other without a gap: a step that
    reaches the end of one takes its last rows from the next, so that any number of rows serves any size of
    step. The place is two numbers, so resuming is exact.

    num_workers: threads that make the next steps ready while one is computed; 0: each is made when asked for.
    The order does not depend on it, nor does the place: that is of the steps given out, not of those made.
    Threads, since making a step is copying (which frees the interpreter), and a process that holds a model
    in hundreds of gigabytes is not one to fork.
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
                "there is no sequence to train on",
                hint="'horizon data preview' shows what becomes of the data; max_length, truncation and "
                "loss_on decide what is left",
            )
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ValueError(f"batch sizes must be positive: {micro_batch_size}, {micro_batches_per_step}")
        self._rows = rows
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._seed, self._pad_id = seed, pad_id
        self._ahead = StepsAhead(num_workers)
        self._go_to(0, 0)

    @property
    def rows_per_step(self) -> int:
        """Sequences in one step, over all its micro-batches."""
        return self._micro_batch_size * self._micro_batches_per_step

    @property
    def epoch(self) -> float:
        """Epochs given out so far, as a number that grows with each step."""
        return self._given / len(self._rows)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """The micro-batches of the next step (see `collate`).

        Labels are aligned with the inputs, as transformers wants them; the model shifts.
        """
        batches, self.size = self._ahead.next(self._next_job)
        self._given += self.rows_per_step
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it is a place in."""
        epoch, position = divmod(self._given, len(self._rows))
        return {
            "made_from": self._rows.made_from,
            "epoch": epoch,
            "position": position,
            "seed": self._seed,
            "rows": len(self._rows),
            "fingerprint": self._rows.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises `DataError` if the data is not what it was then."""
        if state["fingerprint"] != self._rows.fingerprint:
            raise data_has_changed(state, self._rows)
        self._seed = int(state["seed"])
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._ahead.clear()
        self._given = epoch * len(self._rows) + position  # rows given out
        self._epoch, self._position = epoch, position  # of the next row to be made ready
        self._order = self._permutation(epoch)
        self.size = StepSize()

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def _next_job(self) -> Callable[[], Step]:
        numbers = self._take(self.rows_per_step)
        return lambda: self._make(numbers)

    def _make(self, numbers: np.ndarray) -> Step:
        batches, size = [], StepSize()
        for micro_batch in numbers.reshape(self._micro_batches_per_step, -1):
            rows = [self._rows.row(number) for number in micro_batch]
            batch, part = collate(rows, self._rows.strategy, self._pad_id)
            batches.append(batch)
            size += part
        return batches, size

    def _take(self, count: int) -> np.ndarray:
        """The next `count` row numbers, over as many epochs as that needs."""
        parts = []
        while count > 0:
            part = self._order[self._position : self._position + count]
            parts.append(part)
            count -= len(part)
            self._position += len(part)
            if self._position == len(self._rows):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
        return np.concatenate(parts)


class StepsAhead:
    """Runs jobs in threads a few ahead of what is asked for; gives their results in the order of the jobs."""

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

    def clear(self) -> None:
        """Forget what was made ready."""
        while self._waiting:
            self._waiting.popleft().cancel()
