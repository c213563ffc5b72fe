"""Whether a step's loss may be learned from: finite, and not far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.errors import LossSpikeError

_LEAST_SPREAD = 1e-3  # of the mean: losses that hardly vary make no spike of a rounding error


class LossGuard:
    """Watches the recent losses. Only losses that were learned from count, so that neither a NaN nor a spike
    changes what is normal."""

    def __init__(self, config: TrainConfig) -> None:
        self.policy = config.loss_spike
        self._sigmas = config.loss_spike_sigmas
        self._recent: deque[float] = deque(maxlen=config.loss_spike_window)
        self._needed = max(5, config.loss_spike_window // 5)

    def limit(self) -> float:
        """Losses above this are spikes; infinite as long as too little is known."""
        if self.policy == "ignore" or len(self._recent) < self._needed:
            return math.inf
        mean = statistics.fmean(self._recent)
        return mean + self._sigmas * max(statistics.pstdev(self._recent, mean), _LEAST_SPREAD * abs(mean))

    def learned(self, loss: float) -> None:
        if self.policy != "ignore" and loss <= self.limit():
            self._recent.append(loss)

    def describe(self, loss: float) -> str:
        mean = statistics.fmean(self._recent)
        return f"the loss is {loss:.4g}, far above {mean:.4g}, the mean of the last {len(self._recent)} steps"

    def fault(self, step: int, loss: float, num_tokens: int) -> LossSpikeError:
        error = LossSpikeError(
            f"step {step}: {self.describe(loss)} (the limit is {self.limit():.4g})",
            hint="look at the data of this step, lower learning_rate, or set loss_spike: skip or rollback",
        )
        error.loss, error.num_tokens = loss, num_tokens
        return error

    def state_dict(self) -> list[float]:
        return list(self._recent)

    def load_state_dict(self, state: Any) -> None:
        self._recent.clear()
        self._recent.extend(float(loss) for loss in state)
