"""What the calls of `HostModel` return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """loss: mean cross-entropy over all target tokens of the step (plus the router's auxiliary
    loss where the model asks for it), or the sum of what a loss function of your own returned;
    num_tokens: target tokens, that is labels that are not ignored; metrics: what the loss function
    returned beside the loss, for each micro-batch."""

    loss: float
    num_tokens: int
    metrics: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class StepOutput:
    """grad_norm: global L2 norm of the gradients before clipping."""

    grad_norm: float


@dataclass(frozen=True)
class TrainStepOutput(ForwardBackwardOutput):
    """As `ForwardBackwardOutput`, and the global L2 norm of the gradients before clipping."""

    grad_norm: float = math.nan


@dataclass(frozen=True)
class EvaluationOutput:
    """loss: mean cross-entropy in nats over all target tokens; log_probs: where asked for, log p(label)
    for each micro-batch, fp32 [batch, tokens - 1], aligned with labels[:, 1:], 0 where ignored."""

    loss: float
    num_tokens: int
    log_probs: list[torch.Tensor] | None = None

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf
