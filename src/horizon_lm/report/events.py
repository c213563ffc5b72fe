"""What a run reports as it goes: one optimizer step, one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    step: from 1. epoch: passes over the data so far. loss: mean over the step's target tokens;
    grad_norm: before clipping, NaN where it was not taken. num_tokens: target tokens. skipped: nothing was
    updated, as the loss or the norm was not finite, or a spike. rolled_back_to: the step that the run went
    back to after this one. note: what was wrong, in words; empty for nearly all steps. changes: settings that
    do not hold any more from this step on, and why, such as a layer that cannot keep its activations.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float
    skipped: bool
    rolled_back_to: int | None = None
    note: str = ""
    changes: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """eval_loss: mean cross-entropy in nats over all target tokens; eval_perplexity: e to that power."""

    step: int
    eval_loss: float
    eval_perplexity: float
    eval_tokens: int
    eval_seconds: float
