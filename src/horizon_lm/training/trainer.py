"""What a run carries from step to step beside the model: its place, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader
from horizon_lm.host_model import HostModel
from horizon_lm.report.metrics import Meter, Metrics, finite_or_none
from horizon_lm.report.records import StepRecord
from horizon_lm.training.best import Best
from horizon_lm.training.guard import LossGuard
from horizon_lm.training.loop import LoopState, RollBack, train_steps
from horizon_lm.training.resume import loop_state


class Trainer:
    """The loop's place, the loader's, the sums of the metrics, the recent losses and the best evaluation
    (which `Best.restore` puts back, as it needs the checkpoint's own folder). The learning rate is a
    function of the step, dropout one of seed, step, layer and micro-batch: neither has a state to keep."""

    def __init__(self, model: HostModel, loader: Loader, meter: Meter, guard: LossGuard, best: Best) -> None:
        self.model, self.loader, self.meter, self.guard, self.best = model, loader, meter, guard, best
        self.loop = LoopState()
        self.last: Metrics | None = None

    def steps(
        self, config: TrainConfig, learning_rate: Callable[[int], float], num_steps: int, roll_back: RollBack
    ) -> Iterator[StepRecord]:
        return train_steps(
            self.model,
            self.loader,
            learning_rate,
            config,
            num_steps,
            state=self.loop,
            guard=self.guard,
            roll_back=roll_back,
        )

    def state(self) -> dict[str, Any]:
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

    def load_state(self, manifest: Manifest) -> None:
        """Raises DataError if the data is not what it was; KeyError, TypeError or ValueError for a state
        that is not one."""
        state = manifest.state
        self.loader.load_state_dict(state["loader"])
        self.loop = loop_state(state)
        self.meter.load_state_dict(state["meter"])
        self.load_guard(manifest)
        self.last = Metrics.from_json(state["last"]) if state["last"] is not None else None

    def load_guard(self, manifest: Manifest) -> None:
        """What a rollback takes back beside the model: the data and the sums go on."""
        self.guard.load_state_dict(manifest.state["losses"])
