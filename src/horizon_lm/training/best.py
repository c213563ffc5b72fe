"""The best evaluation of a run: its checkpoint, and early stopping.

Decisions are those of transformers' Trainer and EarlyStoppingCallback; they depend on the evaluations alone,
so that a resumed run makes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import Checkpoint, open_checkpoint
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.config import TrainConfig
from horizon_lm.errors import CheckpointError
from horizon_lm.report.records import Evaluation


@dataclass(frozen=True)
class Mark:
    """An evaluation. path: the checkpoint of its step, if there is one."""

    value: float
    step: int
    path: Path | None = None


class Best:
    """Compares evaluations. `add` each one; `saved` says how a checkpoint ended.

    best: of all evaluations. kept: of those whose step has a checkpoint; it differs from `best` while one is
    being written, after one that failed, and for an evaluation at the end of the run.
    """

    def __init__(self, config: TrainConfig, run: Path, warn: Callable[[str], None]) -> None:
        self.is_wanted = config.load_best_model_at_end
        self.metric = config.metric_for_best_model
        self._patience, self._threshold = config.early_stopping_patience, config.early_stopping_threshold
        self._sign = -1.0 if config.greater_is_better else 1.0
        self._run, self._warn = run, warn
        self.best: Mark | None = None
        self.kept: Mark | None = None
        self._asked: Mark | None = None
        self._evaluations = self._waited = 0

    @property
    def has_state(self) -> bool:
        """Whether checkpoints keep anything of this."""
        return self.is_wanted or self._patience is not None

    def add(self, evaluation: Evaluation) -> bool:
        """Whether the state after this evaluation's step must be saved, as it is better than what is kept."""
        mark = Mark(float(getattr(evaluation, self.metric)), evaluation.step)
        is_better = self._is_better(mark, self.best)
        by_enough = self.best is None or abs(mark.value - self.best.value) > self._threshold
        self._waited = 0 if not self._evaluations or is_better and by_enough else self._waited + 1
        self._evaluations += 1
        if is_better:
            self.best = mark
        if not self.is_wanted or not self._is_better(mark, self._asked or self.kept):
            return False
        self._asked = mark
        return True

    def _is_better(self, mark: Mark, other: Mark | None) -> bool:
        """Less, or more with greater_is_better; a value that is not finite is never better."""
        if not math.isfinite(mark.value):
            return False
        return other is None or self._sign * mark.value < self._sign * other.value

    @property
    def reason_to_stop(self) -> str | None:
        """Why the run has come to its end early, in words."""
        if self._patience is None or self._waited < self._patience:
            return None
        count = f"{self._waited} evaluation{'s' if self._waited > 1 else ''}"
        best = "" if self.best is None else f", the best is {self.best.value:.4f} at step {self.best.step}"
        return f"early stopping (no better {self.metric} in {count}{best})"

    def saved(self, outcome: Outcome) -> None:
        """Take note of a checkpoint that has ended."""
        if self._asked is not None and outcome.step == self._asked.step:
            if outcome.path is not None:
                self.kept = replace(self._asked, path=outcome.path)
            self._asked = None

    def keep(self, step: int) -> frozenset[str]:
        """Names of checkpoints that must not be pruned once the one of `step` is complete."""
        if self.kept is None or self.kept.path is None or not self._is_own(self.kept.path):
            return frozenset()
        is_replaced = self._asked is not None and self._asked.step == step
        return frozenset(() if is_replaced else (self.kept.path.name,))

    def _is_own(self, path: Path) -> bool:
        return path.parent.resolve() == self._run.resolve()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready. `kept` names its folder: a name for one in the run's own folder, else a path. The
        checkpoint that this is written to may itself be that of the best step."""

        def entry(mark: Mark | None) -> dict[str, Any] | None:
            if mark is None:
                return None
            path = mark.path
            if path is not None:
                path = Path(path.name) if self._is_own(path) else path.resolve()
            return {"value": mark.value, "step": mark.step, "path": None if path is None else str(path)}

        return {
            "best": entry(self.best),
            "kept": entry(self.kept),
            "asked": entry(self._asked),
            "evaluations": self._evaluations,
            "waited": self._waited,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to the state as of a checkpoint; one that has none begins afresh. Raises KeyError,
        TypeError or ValueError for a state that is not one."""
        self.best = self.kept = self._asked = None
        self._evaluations = self._waited = 0
        state = checkpoint.manifest.state.get("best")
        if state is None or not self.has_state:
            return
        self.best = _mark(state["best"])
        self._evaluations, self._waited = int(state["evaluations"]), int(state["waited"])
        kept, asked = _mark(state["kept"]), _mark(state["asked"])
        if asked is not None and asked.step == checkpoint.manifest.step:
            self.kept = replace(asked, path=checkpoint.path)
        elif kept is not None and kept.path is not None:
            kept = replace(kept, path=checkpoint.path.parent / kept.path)
            if _is_checkpoint_of(kept):
                self.kept = kept
            elif self.is_wanted:
                self._warn(
                    f"the checkpoint of the best evaluation so far (step {kept.step}) is not at {kept.path} "
                    "any more; the best is looked for among the evaluations from here on"
                )

    def to_export(self, last_step: int) -> Mark | None:
        """The evaluation whose model is exported; None for the model as it is. path None: the model is that
        of the last step anyway."""
        if not self.is_wanted:
            return None
        if self._asked is not None and self._asked.step == last_step:
            return self._asked
        if self.kept is not None and self.kept.step == last_step:
            return replace(self.kept, path=None)
        return self.kept


def _mark(entry: Any) -> Mark | None:
    if entry is None:
        return None
    path = entry["path"]
    return Mark(float(entry["value"]), int(entry["step"]), None if path is None else Path(str(path)))


def _is_checkpoint_of(mark: Mark) -> bool:
    assert mark.path is not None
    try:
        return open_checkpoint(mark.path).manifest.step == mark.step
    except CheckpointError:
        return False
