"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader
from horizon_lm.errors import LossSpikeError, NonFiniteError
from horizon_lm.host_model import HostModel
from horizon_lm.report.records import StepRecord
from horizon_lm.training.guard import LossGuard


@dataclass
class LoopState:
    """Where the loop stands. step: the last one that was done; the counts are those of the settings
    max_skipped_steps and max_rollbacks."""

    step: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0


# Puts the run back to its last checkpoint and returns the step of that. Raises CheckpointError without one.
RollBack = Callable[[], int]


def train_steps(
    model: HostModel,
    loader: Loader,
    learning_rate: Callable[[int], float],
    config: TrainConfig,
    num_steps: int,
    *,
    state: LoopState | None = None,
    guard: LossGuard | None = None,
    roll_back: RollBack | None = None,
) -> Iterator[StepRecord]:
    """Train from `state` on (the beginning), giving out a record after each step.

    Numbers that are not finite never reach the weights: NonFiniteError is raised before the update,
    or, with `nonfinite: skip`, once more than max_skipped_steps updates in a row had to be left out, or the
    run goes back to its last checkpoint (`rollback`). So too losses that `guard` calls spikes.
    """
    state = state or LoopState()
    guard = guard or LossGuard(config)
    while state.step < num_steps:
        started = time.perf_counter()
        step = state.step + 1
        lr = learning_rate(step - 1)
        micro_batches = next(loader)
        fault: NonFiniteError | None = None
        back = None
        try:
            is_recorded = step % config.logging_steps == 0 or step == recorded_step(num_steps)
            out = model.train_step(
                micro_batches,
                lr,
                config.max_grad_norm,
                config.weight_decay,
                record=is_recorded,
                check=_check(guard, step, config),
            )
            loss, num_tokens, grad_norm = out.loss, out.num_tokens, out.grad_norm
            state.skipped_in_a_row = 0
        except NonFiniteError as error:
            fault = error
            loss, num_tokens, grad_norm = error.loss, error.num_tokens, math.nan
            back = _answer(error, state, config, roll_back)
        note = fault.message if fault else guard.describe(loss) if loss > guard.limit() else ""
        if fault is None:
            guard.learned(loss)
        state.step = step if back is None else back
        seconds = time.perf_counter() - started
        yield StepRecord(
            step,
            loader.epoch,
            loss,
            grad_norm,
            lr,
            num_tokens,
            seconds,
            fault is not None,
            back,
            note,
            model.take_notes(),
        )


def _check(guard: LossGuard, step: int, config: TrainConfig) -> Callable[[float, int], None] | None:
    """Looks at a loss before it is learned from; None where nothing could come of it."""
    if guard.policy in ("ignore", "warn"):
        return None

    def check(loss: float, num_tokens: int) -> None:
        if loss > guard.limit():
            error = guard.fault(step, loss, num_tokens)
            error.state_intact = config.update_mode != "eager"
            raise error

    return check


def _answer(
    error: NonFiniteError, state: LoopState, config: TrainConfig, roll_back: RollBack | None
) -> int | None:
    """What the settings say to a step that must not be learned from: raise, go back (the step that the
    run is at then), or leave the step out (None)."""
    policy = config.loss_spike if isinstance(error, LossSpikeError) else config.nonfinite
    if policy == "rollback" and roll_back is not None:
        state.rollbacks += 1
        if state.rollbacks > config.max_rollbacks:
            raise _too_many_rollbacks(state.rollbacks, error) from error
        state.skipped_in_a_row = 0
        return roll_back()
    if policy != "skip" or not error.state_intact:
        raise error
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row > config.max_skipped_steps:
        raise _too_many(state.skipped_in_a_row, error) from error
    return None


def _too_many_rollbacks(count: int, error: NonFiniteError) -> NonFiniteError:
    return NonFiniteError(
        f"the run would go back to a checkpoint for the {count}th time and max_rollbacks allows {count - 1}; "
        f"the last reason: {error.message}",
        hint="lower learning_rate, or look at the data",
    )


def recorded_step(num_steps: int) -> int:
    """The step whose timeline is kept: an early one, but none in which buffers are still made."""
    return min(3, num_steps)


def _too_many(count: int, error: NonFiniteError) -> NonFiniteError:
    return NonFiniteError(
        f"{count} steps in a row were not finite and max_skipped_steps allows {count - 1}; "
        f"the last: {error.message}",
        hint="look for NaN in the model's weights, or lower learning_rate",
    )
