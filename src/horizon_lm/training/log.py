"""What a run reports, and to whom: metrics.jsonl, loggers, the display, callbacks."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.errors import NonFiniteError
from horizon_lm.report.display import Progress
from horizon_lm.report.loggers import Loggers
from horizon_lm.report.metrics import Metrics, MetricsFile
from horizon_lm.report.records import Evaluation, StepRecord
from horizon_lm.training.callbacks import Callbacks
from horizon_lm.words import size


class RunLog:
    """The listeners of a run.

    Nothing is written before the first step is done; evaluations before it wait.
    """

    def __init__(
        self, folder: RunFolder, file: MetricsFile, loggers: Loggers, progress: Progress, callbacks: Callbacks
    ) -> None:
        self.folder = folder
        self.file, self.loggers, self.progress, self.callbacks = file, loggers, progress, callbacks
        self._before: list[Evaluation] = []
        self._begun = False
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for each in (self.file, self.loggers, self.progress):
            self._open.enter_context(each)
        self._open.push(self._say_what_is_left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _say_what_is_left(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt | NonFiniteError):
            return
        if self.folder.metrics.exists():
            self.progress.warn(f"no model is written; the metrics so far are in {self.folder.metrics}")
        if self.folder.has_checkpoints:
            self.progress.warn(f"the latest checkpoint is there: horizon resume {self.folder.path}")

    def step(self, record: StepRecord, metrics: Metrics | None) -> None:
        self.file.open()  # with the first step that is done, logged or not: from now on the folder is ours
        self._begun = True
        self.file.step = record.step if record.rolled_back_to is None else record.rolled_back_to
        if metrics is not None:
            self.file.write_step(metrics)
        before, self._before = self._before, []
        for evaluation in before:
            self._show(evaluation)
        if metrics is not None:
            self.loggers.step(metrics)
        if record.note:
            self._fault(record)
        for say, texts in ((self.progress.warn, record.changes), (self.progress.stage, record.remarks)):
            for text in texts:
                say(f"step {record.step}: {text}")
                self.file.write_event("note", {"step": record.step, "text": text})
        self.progress.step(record, metrics)
        self.callbacks.step_ended(record, metrics)

    def rest(self, metrics: Metrics) -> Metrics:
        """Report the steps since the last line, where the run ends before the next one is due."""
        self.file.write_step(metrics)
        self.loggers.step(metrics)
        self.callbacks.logged(metrics)
        return metrics

    def _fault(self, record: StepRecord) -> None:
        back = record.rolled_back_to
        what = "not updated" if record.skipped else "learned from"
        if back is not None:
            what = f"back to step {back}"
        self.progress.warn(f"step {record.step} (loss {record.loss:.4g}), {what}: {record.note}")
        values = {"step": record.step, "loss": record.loss, "done": what, "reason": record.note}
        self.file.write_event("fault", values)
        if back is not None:
            self.file.write_event("rollback", {"step": back})

    def evaluation(self, evaluation: Evaluation) -> None:
        if self._begun:
            self._show(evaluation)
        else:
            self._before.append(evaluation)
        self.callbacks.evaluated(evaluation)

    def _show(self, evaluation: Evaluation) -> None:
        self.file.write_evaluation(evaluation)
        self.loggers.evaluation(evaluation)
        self.progress.evaluation(evaluation)

    def checkpoint(self, outcome: Outcome) -> None:
        self.callbacks.note(outcome)
        values = {"step": outcome.step, "seconds": outcome.seconds, "bytes": outcome.num_bytes}
        if outcome.path is None:
            self.progress.warn(f"no checkpoint of step {outcome.step}: {outcome.error}; the run continues")
            self.file.write_event("checkpoint", {**values, "error": outcome.error})
            return
        self.progress.stage(
            f"{outcome.path.name} saved: {size(outcome.num_bytes)} in {outcome.seconds:.1f} s"
        )
        self.file.write_event("checkpoint", {**values, "name": outcome.path.name})
