"""The state that a run carries from step to step besides the model, as checkpoints save it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import Checkpoint, open_checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader
from horizon_lm.errors import CheckpointError, LossSpikeError
from horizon_lm.host_model import HostModel
from horizon_lm.report.metrics import Meter, Metrics
from horizon_lm.report.records import Evaluation

_LEAST_SPREAD = 1e-3  # of the mean: if losses hardly vary, a rounding error must not count as a spike


@dataclass
class LoopState:
    """step: the last one done. The counts are those of max_skipped_steps and max_rollbacks."""

    step: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0


class LossGuard:
    """Detector of loss spikes.

    Only losses that the model learned from count, so that neither a NaN nor a spike changes what is normal.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.policy = config.loss_spike
        self._sigmas = config.loss_spike_sigmas
        self._recent: deque[float] = deque(maxlen=config.loss_spike_window)
        self._needed = max(5, config.loss_spike_window // 5)

    def limit(self) -> float:
        """Return the largest loss that is not a spike; infinite until enough losses are known."""
        if self.policy == "ignore" or len(self._recent) < self._needed:
            return math.inf
        mean = statistics.fmean(self._recent)
        return mean + self._sigmas * max(statistics.pstdev(self._recent, mean), _LEAST_SPREAD * abs(mean))

    def learned(self, loss: float) -> None:
        """Add a loss that the model learned from."""
        if self.policy != "ignore" and loss <= self.limit():
            self._recent.append(loss)

    def describe(self, loss: float) -> str:
        mean = statistics.fmean(self._recent)
        return f"the loss is {loss:.4g}, far above {mean:.4g}, the mean of the last {len(self._recent)} steps"

    def error(self, step: int, loss: float, num_tokens: int) -> LossSpikeError:
        error = LossSpikeError(
            f"step {step}: {self.describe(loss)} (the limit is {self.limit():.4g})",
            hint="look at the data of this step, lower learning_rate, or set loss_spike: skip or rollback",
        )
        error.loss, error.num_tokens = loss, num_tokens
        return error

    def state_dict(self) -> list[float]:
        return list(self._recent)

    def load_state_dict(self, state: Sequence[float]) -> None:
        self._recent.clear()
        self._recent.extend(float(loss) for loss in state)


@dataclass(frozen=True)
class Mark:
    """An evaluation. path: the checkpoint of its step, if any."""

    value: float
    step: int
    path: Path | None = None


class Best:
    """Comparison of evaluations. `add` each one; `saved` says how a checkpoint ended.

    Decisions are those of transformers' Trainer and EarlyStoppingCallback; they depend on the evaluations
    alone, so that a resumed run makes the same ones.

    best: the best of all evaluations. kept: the best of those whose step has a checkpoint; it differs from
    `best` while a checkpoint is being written, after one that failed, and at the end of the run.
    """

    def __init__(self, config: TrainConfig, run: Path, warn: Callable[[str], None]) -> None:
        self.is_wanted = config.load_best_model_at_end
        self.metric = config.metric_for_best_model
        self._patience, self._threshold = config.early_stopping_patience, config.early_stopping_threshold
        greater = config.greater_is_better
        if greater is None:
            greater = "rewards" in self.metric
        self._sign = -1.0 if greater else 1.0
        self._run, self._warn = run, warn
        self.best: Mark | None = None
        self.kept: Mark | None = None
        self._asked: Mark | None = None
        self._evaluations = self._waited = 0

    @property
    def has_state(self) -> bool:
        """Whether checkpoints save this state."""
        return self.is_wanted or self._patience is not None

    def add(self, evaluation: Evaluation) -> bool:
        """Add an evaluation; tell whether its step must be saved, as it is better than what is kept."""
        mark = Mark(evaluation.value(self.metric), evaluation.step)
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
        """Compare by greater_is_better; a value that is not finite is never better."""
        if not math.isfinite(mark.value):
            return False
        return other is None or self._sign * mark.value < self._sign * other.value

    @property
    def reason_to_stop(self) -> str | None:
        """Why the run ends early, in words; None if it does not."""
        if self._patience is None or self._waited < self._patience:
            return None
        count = f"{self._waited} evaluation{'s' if self._waited > 1 else ''}"
        best = "" if self.best is None else f", the best is {self.best.value:.4f} at step {self.best.step}"
        return f"early stopping (no better {self.metric} in {count}{best})"

    def saved(self, outcome: Outcome) -> None:
        """Note how a checkpoint ended."""
        if self._asked is not None and outcome.step == self._asked.step:
            if outcome.path is not None:
                self.kept = replace(self._asked, path=outcome.path)
            self._asked = None

    def keep(self, step: int) -> frozenset[str]:
        """Return names of checkpoints that must not be pruned once the one of `step` is complete."""
        if self.kept is None or self.kept.path is None or not self._is_own(self.kept.path):
            return frozenset()
        is_replaced = self._asked is not None and self._asked.step == step
        return frozenset(() if is_replaced else (self.kept.path.name,))

    def _is_own(self, path: Path) -> bool:
        return path.parent.resolve() == self._run.resolve()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-ready. `kept` has the name of a folder in the run's own folder, else a path.
        The checkpoint that this is written to may itself be that of the best step."""

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
        """Load the state of a checkpoint; reset it if the checkpoint has none.

        Raises KeyError, TypeError or ValueError for an invalid state.
        """
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
                    f"the checkpoint of the best evaluation so far (step {kept.step}) is no longer at "
                    f"{kept.path}; the best is chosen among the evaluations from here on"
                )

    def to_export(self, last_step: int) -> Mark | None:
        """Return the evaluation whose model to export; None for the model as it is. Its path is None if the
        model is that of the last step anyway."""
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


class RunState:
    """Position of the loop and the loader, sums of the metrics, recent losses, best evaluation.

    The learning rate is a function of the step, dropout one of seed, step, layer and micro-batch: neither has
    state.
    """

    def __init__(
        self, config: TrainConfig, model: HostModel, loader: Loader, meter: Meter, best: Best
    ) -> None:
        self.config, self.model, self.loader, self.meter, self.best = config, model, loader, meter, best
        self.loop = LoopState()
        self.guard = LossGuard(config)
        self.last: Metrics | None = None

    @property
    def step(self) -> int:
        """The last step done."""
        return self.loop.step

    def state_dict(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint keeps, JSON-ready."""
        return {
            "steps_done": self.model.steps_done,
            "loop": asdict(self.loop),
            "loader": self.loader.state_dict(),
            "meter": self.meter.state_dict(),
            "losses": self.guard.state_dict(),
            "kept_in_fp32": self.model.kept_in_fp32,
            "last": self.last.to_json() if self.last is not None else None,
            **({"best": self.best.state_dict()} if self.best.has_state else {}),
        }

    def load(self, manifest: Manifest) -> None:
        """Load all but the best evaluation, which needs the checkpoint's folder (`Best.restore`).

        Raises DataError if the data has changed; KeyError, TypeError or ValueError for an invalid state.
        """
        state = manifest.state
        self.loader.load_state_dict(state["loader"])
        counts = state["loop"]
        self.loop = LoopState(**{key: int(counts[key]) for key in ("step", "skipped_in_a_row", "rollbacks")})
        self.meter.load_state_dict(state["meter"])
        self.load_guard(manifest)
        self.last = Metrics.from_json(state["last"]) if state["last"] is not None else None

    def load_guard(self, manifest: Manifest) -> None:
        """Load what a rollback restores besides the model; the data and the sums go on."""
        self.guard.load_state_dict(manifest.state["losses"])
