"""A run before its first step: what it is asked to do, then its data and model."""

from __future__ import annotations

from dataclasses import dataclass

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.data import TrainingData
from horizon_lm.host_model import HostModel
from horizon_lm.plan.run_plan import RunPlan
from horizon_lm.report.display import Progress
from horizon_lm.training.preferences import Preferences
from horizon_lm.training.resume import Resume
from horizon_lm.training.together import Together


@dataclass(frozen=True)
class Asked:
    """What a run is asked to do, where, and by which ranks.

    config: the settings as given, which the run's folder keeps, so that a plan for another machine can be
    made from them. launchers: see `restarts`.
    """

    config: TrainConfig
    folder: RunFolder
    progress: Progress
    resume: Resume | None
    together: Together
    launchers: list[str]


@dataclass(frozen=True)
class Ready:
    """A run whose data and model are there. config: the resolved settings. plan: the plan behind them, which
    rank 0 has."""

    asked: Asked
    config: TrainConfig
    plan: RunPlan | None
    data: TrainingData
    model: HostModel
    preferences: Preferences | None
