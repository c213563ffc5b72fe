"""Evaluation during a run: the loss on held-out sequences, and when it is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from horizon_lm.config import TrainConfig
from horizon_lm.config.data import IGNORED
from horizon_lm.data.collate import in_order
from horizon_lm.data.rows import Rows
from horizon_lm.errors import DataError
from horizon_lm.host_model import HostModel
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.outputs import perplexity
from horizon_lm.report.records import Evaluation

# Micro-batches per visit of a layer. Their boundaries occupy memory, so there is a limit; with this many the
# upload of the weights is a small part of the time.
_TOGETHER = 16


def evaluate(
    model: HostModel, rows: Rows, *, micro_batch_size: int, pad_id: int, step: int = 0
) -> Evaluation:
    """Return the mean over all target tokens of `rows`, each counted once. Raises DataError."""
    started = time.perf_counter()
    total, num_tokens = 0.0, 0
    for group in _groups(in_order(rows, micro_batch_size, pad_id)):
        out = model.evaluate(group)
        total += out.loss * out.num_tokens
        num_tokens += out.num_tokens
    if num_tokens == 0:
        raise DataError("the evaluation set has no token to predict", hint="check eval_datasets and loss_on")
    loss = total / num_tokens
    seconds = time.perf_counter() - started
    return Evaluation(step, loss, perplexity(loss), num_tokens, seconds)


def _groups(batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Group the micro-batches that have a target; the model rejects a call without any."""
    useful = (batch for batch in batches if bool((batch["labels"][:, 1:] != IGNORED).any()))
    while group := list(islice(useful, _TOGETHER)):
        yield group


class Evaluator:
    """Evaluation of a run when it is due: every eval_steps steps or each epoch, and at the end."""

    def __init__(
        self,
        measure: Callable[[int], Evaluation],
        config: TrainConfig,
        *,
        num_steps: int,
        epochs_done: int = 0,
    ) -> None:
        """measure: evaluates the model as it is after a step."""
        self._measure = measure
        self._strategy, self._every = config.eval_strategy, config.eval_steps
        self._num_steps = num_steps
        self._epochs_done = epochs_done

    def run(self, step: int) -> Evaluation:
        return self._measure(step)

    def after(self, step: int, epoch: float, *, is_last: bool = False) -> Evaluation | None:
        """Evaluate if that is due after a step. is_last: the run ends here, early or not."""
        crossed = int(epoch) > self._epochs_done
        self._epochs_done = int(epoch)
        is_due = (
            is_last
            or step == self._num_steps
            or self._strategy == "steps"
            and step % self._every == 0
            or self._strategy == "epoch"
            and crossed
        )
        return self.run(step) if is_due else None
