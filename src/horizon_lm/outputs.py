"""What the calls of `HostModel` return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


def _shown(output: Any, **values: Any) -> str:
    """Class and values on one line, numbers with six digits; empty ones left out."""
    parts = [
        f"{n}={v:.6g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items() if v not in ("", [])
    ]
    return f"{type(output).__name__}({', '.join(parts)})"


def perplexity(loss: float) -> float:
    """Return e to the power of a loss in nats; infinite if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, repr=False)
class ForwardBackwardOutput:
    """loss: mean cross-entropy over all target tokens of the step (plus the router's auxiliary
    loss where the model asks for it), or the sum of what a loss function of your own returned;
    num_tokens: target tokens, that is labels that are not ignored; metrics: what the loss function
    returned beside the loss, for each micro-batch."""

    loss: float
    num_tokens: int
    metrics: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        return _shown(self, loss=self.loss, num_tokens=self.num_tokens, metrics=self._metrics())

    def _metrics(self) -> list[dict[str, float]]:
        return self.metrics if any(self.metrics) else []


@dataclass(frozen=True, repr=False)
class StepOutput:
    """grad_norm: global L2 norm of the gradients before clipping."""

    grad_norm: float

    def __repr__(self) -> str:
        return _shown(self, grad_norm=self.grad_norm)


@dataclass(frozen=True, repr=False)
class TrainStepOutput(ForwardBackwardOutput):
    """As `ForwardBackwardOutput`, and the global L2 norm of the gradients before clipping."""

    grad_norm: float = math.nan

    def __repr__(self) -> str:
        values = {"loss": self.loss, "num_tokens": self.num_tokens, "grad_norm": self.grad_norm}
        return _shown(self, **values, metrics=self._metrics())


@dataclass(frozen=True, repr=False)
class EvaluationOutput:
    """loss: mean cross-entropy in nats over all target tokens; log_probs: where asked for, log p(label)
    for each micro-batch, fp32 [batch, tokens - 1], aligned with labels[:, 1:], 0 where ignored."""

    loss: float
    num_tokens: int
    log_probs: list[torch.Tensor] | None = None

    def __repr__(self) -> str:
        shapes = " ".join(str(list(found.shape)) for found in self.log_probs or ())
        return _shown(
            self,
            loss=self.loss,
            perplexity=self.perplexity,
            num_tokens=self.num_tokens,
            log_probs=f"<{len(self.log_probs)} of shape {shapes}>" if self.log_probs else "",
        )

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)
