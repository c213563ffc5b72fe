"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config import TrainConfig
from ..data import Loader
from ..errors import NonFiniteError
from .host_model import HostModel


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    step: from 1. epoch: passes over the data so far. loss: mean over the step's target tokens;
    grad_norm: before clipping, NaN where it was not taken. num_tokens: target tokens. skipped: the
    loss or the norm was not finite and nothing was updated.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float
    skipped: bool


def train_steps(
    model: HostModel,
    loader: Loader,
    learning_rate: Callable[[int], float],
    config: TrainConfig,
    num_steps: int,
) -> Iterator[StepRecord]:
    """Train, giving out a record after each step.

    Numbers that are not finite never reach the weights: NonFiniteError is raised before the update,
    or, with `nonfinite: skip`, once more than max_skipped_steps updates in a row had to be left out.
    """
    skipped_in_a_row = 0
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        lr = learning_rate(step - 1)
        micro_batches = next(loader)
        try:
            is_recorded = step % config.logging_steps == 0 or step == recorded_step(num_steps)
            out = model.train_step(
                micro_batches, lr, config.max_grad_norm, config.weight_decay, record=is_recorded
            )
            loss, num_tokens, grad_norm = out.loss, out.num_tokens, out.grad_norm
            skipped_in_a_row = 0
        except NonFiniteError as error:
            loss, num_tokens, grad_norm = error.loss, error.num_tokens, math.nan
            skipped_in_a_row += 1
            if config.nonfinite == "raise" or not error.state_intact:
                raise
            if skipped_in_a_row > config.max_skipped_steps:
                raise _too_many(skipped_in_a_row, error) from error
        seconds = time.perf_counter() - started
        yield StepRecord(step, loader.epoch, loss, grad_norm, lr, num_tokens, seconds, skipped_in_a_row > 0)


def recorded_step(num_steps: int) -> int:
    """The step whose timeline is kept: an early one, but none in which buffers are still made."""
    return min(3, num_steps)


def _too_many(count: int, error: NonFiniteError) -> NonFiniteError:
    return NonFiniteError(
        f"{count} steps in a row were not finite and max_skipped_steps allows {count - 1}; "
        f"the last: {error.message}",
        hint="look for NaN in the model's weights, or lower learning_rate",
    )


def count_steps(config: TrainConfig, num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of the run: max_steps, or what num_train_epochs over `num_rows` sequences takes.

    The last step of an epoch that does not come out even takes rows of the next.
    """
    if config.max_steps > 0:
        return config.max_steps
    steps = config.num_train_epochs * num_rows / rows_per_step
    return max(1, math.ceil(steps - 1e-9))  # 0.1 * 30 is not to become 4 steps by a rounding error
