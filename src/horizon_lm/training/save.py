"""Save a run: checkpoints in the background, rollback, the last checkpoint of a stopped run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.folder import Retention
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import CheckpointError, DoesNotFitError, StoppedError
from horizon_lm.report.records import StepRecord
from horizon_lm.training.checkpoint_series import CheckpointSeries, Content
from horizon_lm.training.resume import list_together, load_checkpoint
from horizon_lm.training.run_settings import absolute
from horizon_lm.training.signals import REQUEUE, StopRequest
from horizon_lm.training.state import RunState
from horizon_lm.training.together import Together, shared
from horizon_lm.words import count

_SMALL = 1_000_000_000  # bytes: save_last=auto saves the end of any run whose checkpoint takes no more


@dataclass(frozen=True)
class Due:
    """What the clock says. has_ended: the checkpoint in the background is done, or there is none; is_time:
    save_minutes are over; is_deadline_near: only two more steps and a checkpoint are left."""

    has_ended: bool
    is_time: bool
    is_deadline_near: bool


class Saver:
    """Checkpoints of one run: when they are due, how they end, what to return to.

    All ranks of a run call the same methods at the same step; which checkpoints there are, and whether the
    disk has room, is as rank 0 says.
    """

    def __init__(
        self,
        run: Path,
        state: RunState,
        *,
        small_files: Mapping[str, bytes],
        report: Callable[[Outcome], None],
        started: float,
        parent: Path | None = None,
    ) -> None:
        """small_files: configuration and tokenizer. report: is told how each checkpoint ended. started:
        `time.monotonic()` from which the deadline counts. parent: the checkpoint that the run began from."""
        self._run, self._state, self._model, self._config = run, state, state.model, state.config
        self._together = Together(state.model.ranks)
        self._started = started
        self._small_files, self._report = small_files, report
        self._parent = str(parent) if parent is not None else None
        self._settings = absolute(state.config).to_dict()
        patience = self._config.save_patience_seconds
        self._series = CheckpointSeries(
            run, state.model, self._ended, patience_seconds=patience, together=self._together
        )
        self._is_extra = False  # a failed save of the end must not fail the run
        self._saved_step = -1
        self._epochs = int(state.loader.state_dict().get("epoch", 0))
        self._last_save = time.monotonic()
        self._save_seconds = self._step_seconds = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint."""
        return self._series.num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Finish what is being written, also after an error; abandon it if the run ends at once."""
        self._series.close(error)

    # After a step.

    def due(self) -> Due:
        """Look at the clock and at the checkpoint in the background."""
        since = time.monotonic() - self._last_save
        return Due(self._series.has_ended, since >= 60 * self._config.save_minutes, self._is_deadline_near())

    def _is_deadline_near(self) -> bool:
        minutes = self._config.deadline_minutes
        if minutes is None:
            return False
        needed = 2 * self._step_seconds + 1.5 * self._save_seconds + 1.0
        return time.monotonic() + needed >= self._started + 60 * minutes

    def after(self, record: StepRecord, due: Due, *, is_last: bool, is_best: bool = False) -> None:
        """Save if that is due, and report what has ended meanwhile.

        is_best: the evaluation was the best, so save, unless the model is exported now anyway. Raises
        DoesNotFitError after too many failures.
        """
        self._step_seconds = max(record.seconds, 0.5 * self._step_seconds)
        if due.has_ended:
            self._series.poll()
        if record.rolled_back_to is not None:
            return
        if self._is_due(record, due) or is_best and not is_last:
            self.save(record.step, background=self._config.save_in_background and not is_last)
        elif is_last and self._keeps_end(record.step):
            self._save_end(record.step)

    def _is_due(self, record: StepRecord, due: Due) -> bool:
        config = self._config
        crossed, self._epochs = int(record.epoch) > self._epochs, int(record.epoch)
        if config.save_strategy == "no":
            return False
        if record.step == 1 and config.save_first_step:
            return True
        return {
            "steps": record.step % config.save_steps == 0,
            "epoch": crossed,
            "time": due.is_time,
        }[config.save_strategy]

    def _keeps_end(self, num_steps: int) -> bool:
        """Tell whether the end of a run of `num_steps` is saved although no other setting asks for it."""
        config = self._config
        if config.save_strategy == "no" or config.save_last is False:
            return False
        is_long = config.save_strategy != "steps" or num_steps >= config.save_steps
        return config.save_last is True or is_long or self.num_bytes <= _SMALL

    def _save_end(self, step: int) -> None:
        """Save the end of the run if the disk has room for it and the model; ignore failures."""
        model = self._model.num_exported * DTYPES[self._config.save_dtype or self._config.dtype].itemsize
        self._is_extra = True
        self.save(step, background=False, beside_bytes=model)

    def save(self, step: int, *, background: bool, beside_bytes: int = 0) -> None:
        """Save the state after `step`. beside_bytes: what else the disk needs room for."""
        self.finish()
        self._last_save = time.monotonic()
        config = self._config
        content = Content(
            step, self._settings, self._state.state_dict(), self._small_files, parent=self._parent
        )
        keep = Retention(config.save_total_limit, config.save_keep_every, self._state.best.keep(step))
        self._series.begin(content, keep, background=background, beside_bytes=beside_bytes)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it."""
        self._series.finish()

    def _ended(self, outcome: Outcome) -> None:
        self._state.best.saved(outcome)
        self._report(outcome)
        self._save_seconds = max(self._save_seconds, outcome.seconds)
        self._saved_step = outcome.step if outcome.path is not None else self._saved_step
        limit, failed = self._config.max_failed_saves, self._series.failed_in_a_row
        if limit is not None and failed > limit and not self._is_extra:
            raise shared(
                DoesNotFitError(
                    f"{failed} checkpoints in a row could not be saved "
                    f"(max_failed_saves={limit}); the last: {outcome.error}",
                    hint=f"free disk space, then horizon resume {self._run}: the last good checkpoint is "
                    "intact",
                )
            )

    # After a failed step, or when the run must stop.

    def roll_back(self) -> int:
        """Load the latest checkpoint, while the data continues; return its step.

        Raises CheckpointError if there is none.
        """
        self.finish()
        found, rejected = list_together(self._run, self._together)
        for checkpoint in found:
            try:
                self._together.each(
                    f"go back to {checkpoint.path.name}", partial(load_checkpoint, checkpoint, self._model)
                )
            except CheckpointError as error:
                rejected.append(checkpoints.Rejected(checkpoint.path, error.message))
                continue
            self._state.load_guard(checkpoint.manifest)
            self._state.best.restore(checkpoint)
            return checkpoint.manifest.step
        raise shared(checkpoints.none_valid(self._run, rejected))

    def secure(self, step: int) -> str | None:
        """Save, unless done or not wanted; say what there is to resume from, None if nothing."""
        self.finish()
        wanted = self._config.save_on_signal and self._config.save_strategy != "no"
        if wanted and self._saved_step != step:
            self.save(step, background=False)
        return self._together.first("the latest checkpoint", lambda: self._latest(step))

    def _latest(self, step: int) -> str | None:
        """Say what there is to resume from after `step`."""
        found, _ = checkpoints.list_checkpoints(self._run)
        if not found:
            return None
        latest = found[0]
        lost = step - latest.manifest.step
        if not lost:
            return f"saved {latest.path}"
        return f"the last checkpoint is {latest.path}, {count(lost, 'step')} before"

    def stop(self, request: StopRequest, step: int) -> StoppedError:
        """Save, and return the error that ends the run. Raises CheckpointError if no checkpoint exists."""
        saved = self.secure(step)
        why = request.signal.name if request.signal is not None else "deadline_minutes"
        code = request.exit_code if request.signal is not None else REQUEUE
        what = f"stopped by {why} after step {step}"
        if saved is None:
            raise shared(
                CheckpointError(
                    f"{what}; no checkpoint was saved",
                    hint="check save_strategy, save_on_signal and disk space",
                )
            )
        return shared(StoppedError(f"{what}: {saved}", f"horizon resume {self._run}", code))
