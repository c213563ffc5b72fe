"""The training loop: step, evaluate, log, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.reader import verify
from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import TokenLoss
from horizon_lm.errors import CheckpointError, LossSpikeError, NonFiniteError
from horizon_lm.machine.heap import frozen_heap
from horizon_lm.optim.curves import Curve
from horizon_lm.preference.method import Sums
from horizon_lm.report.by_rank import OwnFigures
from horizon_lm.report.display import number
from horizon_lm.report.metrics import Metrics
from horizon_lm.report.records import Evaluation, StepRecord
from horizon_lm.training.decisions import Decisions
from horizon_lm.training.evaluate import Evaluator
from horizon_lm.training.log import RunLog
from horizon_lm.training.memory_faults import explained
from horizon_lm.training.preferences import Preferences
from horizon_lm.training.resume import load_checkpoint
from horizon_lm.training.save import Saver
from horizon_lm.training.signals import watched
from horizon_lm.training.state import Best, LossGuard, Mark, RunState
from horizon_lm.training.together import Together, shared


@dataclass(frozen=True)
class Run:
    """A run ready for its first step; `train` assembles it.

    in_place: the run goes on in a folder that is its own already.
    """

    config: TrainConfig
    state: RunState
    learning_rate: Curve
    num_steps: int
    evaluator: Evaluator | None
    log: RunLog
    saver: Saver
    in_place: bool
    preferences: Preferences | None = None
    together: Together = field(default_factory=Together)


@dataclass(frozen=True)
class RunEnd:
    """last: metrics of the last step. exported_step, exported_tokens: of the model to export. stopped_by: who
    ended the run before num_steps. remarks: how it ended, in words."""

    last: Metrics
    exported_step: int
    exported_tokens: int
    stopped_by: str | None
    remarks: tuple[str, ...]


def run_loop(run: Run) -> RunEnd:
    """Train to the last step, or until a callback, early stopping or a signal ends the run.

    Leaves in `run.state.model` the model to export. Raises StoppedError after a signal or at the deadline,
    NonFiniteError, CallbackError, DoesNotFitError.
    """
    state, log, saver, best = run.state, run.log, run.saver, run.state.best
    with log, saver, frozen_heap(), watched() as request, _telling(run):
        figures = OwnFigures(state.model, run.together.ranks)
        told = Decisions(run.together, request, saver, log.callbacks, figures)
        _begin(run)
        stopped_by = best.reason_to_stop  # set if the run was killed after early stopping
        while state.step < run.num_steps and stopped_by is None:
            record = _step(run)
            told.meet(f"step {record.step}", is_logged=state.meter.is_due(record.step))
            metrics = state.meter.add(record, told.by_rank)
            state.last = metrics or state.last
            log.step(record, metrics)
            if record.step == recorded_step(run.num_steps):
                log.file.write_timeline(record.step, state.model.timeline)

            told.tell_callbacks(f"callbacks of step {record.step}")
            evaluation = _evaluate(run, record)
            is_best = evaluation is not None and best.add(evaluation)
            if evaluation is not None:
                log.evaluation(evaluation)
                told.meet(f"evaluation of step {record.step}")
                told.tell_callbacks(f"callbacks of the evaluation of step {record.step}")

            if state.step < run.num_steps:
                stopped_by = log.callbacks.stopped_by or best.reason_to_stop
            is_last = state.step == run.num_steps or stopped_by is not None
            if is_last and metrics is None:
                state.last = log.rest(state.meter.rest())

            saver.after(record, told.due, is_last=is_last, is_best=is_best)
            _call_on_save(run, told)
            if told.stop.signal is not None or not is_last and told.due.is_deadline_near:
                raise saver.stop(told.stop, state.step)
        saver.finish()
        _call_on_save(run, told)
        log.file.open()  # also if there was no step left
        return _finish(run, stopped_by)


@contextmanager
def _telling(run: Run) -> Iterator[None]:
    """Tell other ranks at once of an error that is this rank's own, before anything is wound up."""
    try:
        yield
    except BaseException as error:
        run.together.ranks.publish_failure(explained(error, run.config))
        raise


def _begin(run: Run) -> None:
    """Evaluate the model as it is, if eval_on_start asks for that, and start the display."""
    if run.state.step >= run.num_steps and not run.in_place:
        run.log.file.open()  # no step is left that would make the folder this run's
    if run.evaluator is not None and run.config.eval_on_start and not run.state.step:
        run.log.evaluation(run.evaluator.run(0))
    run.log.progress.start(run.num_steps)


def _step(run: Run) -> StepRecord:
    """Train one step.

    A loss that is not finite never reaches the weights. By `nonfinite` it ends the run, skips the update (at
    most max_skipped_steps in a row) or returns the run to its last checkpoint (at most max_rollbacks times);
    by `loss_spike` a spike does the same.
    """
    started = time.perf_counter()
    state, config, guard = run.state, run.config, run.state.guard
    step = state.step + 1
    lr = run.learning_rate(step - 1)
    micro_batches = next(state.loader)
    loss_fn: TokenLoss | None = None
    if run.preferences is not None:
        micro_batches, loss_fn = run.preferences.step(state.model, micro_batches)
    fault: NonFiniteError | None = None
    back = None
    sums: Sums = {}
    try:
        out = state.model.train_step(
            micro_batches,
            lr,
            config.max_grad_norm,
            config.weight_decay,
            loss_fn=loss_fn,
            record=step % config.logging_steps == 0 or step == recorded_step(run.num_steps),
            check=_check(guard, step, config),
        )
        loss, num_tokens, grad_norm = out.loss, out.num_tokens, out.grad_norm
        if run.preferences is not None:
            sums = run.preferences.method.counted(out.metrics, micro_batches)
        state.loop.skipped_in_a_row = 0
    except NonFiniteError as error:
        fault = error
        loss, num_tokens, grad_norm = error.loss, error.num_tokens, math.nan
        back = _answer(error, run)
    note = fault.message if fault else guard.describe(loss) if loss > guard.limit() else ""
    if fault is None:
        guard.learned(loss)
    state.loop.step = step if back is None else back
    return StepRecord(
        step,
        state.loader.epoch,
        loss,
        grad_norm,
        lr,
        num_tokens,
        time.perf_counter() - started,
        skipped=fault is not None,
        rolled_back_to=back,
        note=note,
        changes=state.model.take_notes(),
        remarks=state.model.take_remarks(),
        num_samples=0 if run.preferences is None else sum(len(b["samples"]) for b in micro_batches),
        sums=sums,
    )


def _check(guard: LossGuard, step: int, config: TrainConfig) -> Callable[[float, int], None] | None:
    """Return a check of a loss before the update; None if `loss_spike` needs none."""
    if guard.policy in ("ignore", "warn"):
        return None

    def check(loss: float, num_tokens: int) -> None:
        if loss > guard.limit():
            error = guard.error(step, loss, num_tokens)
            error.state_intact = config.update_mode != "eager"
            raise error

    return check


def _answer(error: NonFiniteError, run: Run) -> int | None:
    """Raise, roll back (returns the step of the checkpoint) or skip the update (returns None)."""
    loop, config = run.state.loop, run.config
    policy = config.loss_spike if isinstance(error, LossSpikeError) else config.nonfinite
    if policy == "rollback":
        loop.rollbacks += 1
        if loop.rollbacks > config.max_rollbacks:
            raise shared(
                NonFiniteError(
                    f"rollback limit reached (max_rollbacks={config.max_rollbacks}): {error.message}",
                    hint="lower learning_rate or inspect the data",
                )
            ) from error
        loop.skipped_in_a_row = 0
        return run.saver.roll_back()
    if policy != "skip" or not error.state_intact:
        raise shared(error)
    loop.skipped_in_a_row += 1
    if loop.skipped_in_a_row > config.max_skipped_steps:
        raise shared(
            NonFiniteError(
                f"skip limit reached (max_skipped_steps={config.max_skipped_steps} in a row): "
                f"{error.message}",
                hint="look for NaN in the model's weights, or lower learning_rate",
            )
        ) from error
    return None


def recorded_step(num_steps: int) -> int:
    """Return the step whose timeline is kept: an early one, after those that allocate buffers."""
    return min(3, num_steps)


def _evaluate(run: Run, record: StepRecord) -> Evaluation | None:
    if run.evaluator is None or record.rolled_back_to is not None:
        return None
    is_last = run.state.step == run.num_steps or run.log.callbacks.stopped_by is not None
    return run.evaluator.after(record.step, record.epoch, is_last=is_last)


def _call_on_save(run: Run, told: Decisions) -> None:
    """Call on_save for new checkpoints, then save and raise if a callback has failed."""
    callbacks = run.log.callbacks
    callbacks.saved()
    told.tell_callbacks(f"callbacks of the checkpoints up to step {run.state.step}")
    if callbacks.error is not None:
        raise callbacks.fault(run.saver.secure(run.state.step), run.log.folder.path)


def _finish(run: Run, stopped_by: str | None) -> RunEnd:
    """Leave the model as it is to be exported, with load_best_model_at_end as of the best evaluation."""
    state, best, last = run.state, run.state.best, run.state.last
    assert last is not None, "a run has at least one step, and the last is recorded"
    step, tokens = last.step, last.num_tokens
    events: list[tuple[str, dict[str, Any]]] = []
    remarks: list[str] = []
    if stopped_by is not None:
        events.append(("stopped", {"step": step, "num_steps": run.num_steps, "by": stopped_by}))
        remarks.append(f"stopped at step {step} of {run.num_steps} by {stopped_by}")
    mark = best.to_export(state.step)
    if mark is not None and mark.path is not None:
        found = _load_best(mark, run)
        mark = None if found is None else mark
        step, tokens = (mark.step, found) if mark is not None and found is not None else (step, tokens)
    if mark is not None:
        events.append(("best", {"step": mark.step, "metric": best.metric, "value": mark.value}))
        remarks.append(_best_in_words(best, mark, run.num_steps))
    for event, values in events:
        run.log.file.write_event(event, values)
    return RunEnd(last, step, tokens, stopped_by, tuple(remarks))


def _load_best(mark: Mark, run: Run) -> int | None:
    """Load the checkpoint of `mark` and return the tokens it was trained on; None if that fails, with the
    model as it was."""
    assert mark.path is not None
    together, path = run.together, mark.path
    try:
        together.first("the best checkpoint", partial(_check_sound, path))  # before weights are replaced
        checkpoint = together.each("open the best checkpoint", partial(open_checkpoint, path))
        together.each("load the best checkpoint", partial(load_checkpoint, checkpoint, run.state.model))
        return int(checkpoint.manifest.state["meter"]["sums"][0])
    except CheckpointError as error:
        run.log.progress.warn(
            f"the best model (step {mark.step}) cannot be read: {error.message}; the last one is exported"
        )
        return None


def _check_sound(path: Path) -> None:
    faults = verify(open_checkpoint(path)).faults
    if faults:
        raise CheckpointError(faults[0])


def _best_in_words(best: Best, mark: Mark, num_steps: int) -> str:
    def where(one: Mark) -> str:
        return f"{number(one.value)} was at step {one.step} of {num_steps}"

    kind = best.metric.removeprefix("eval_")
    if best.best is None or best.best.step == mark.step:
        return f"the best held-out {kind} {where(mark)}; that model is exported"
    return (
        f"the best held-out {kind} {where(best.best)}, of which there is no checkpoint; of the others the "
        f"best {where(mark)}; that model is exported"
    )
