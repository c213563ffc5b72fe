"""The state that a run carries from step to step besides the model, as checkpoints save it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader
from horizon_lm.errors import LossSpikeError
from horizon_lm.host_model import HostModel
from horizon_lm.report.metrics import Meter, Metrics, finite_or_none
from horizon_lm.training.evaluate import Best

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
            "last": finite_or_none(asdict(self.last)) if self.last is not None else None,
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
