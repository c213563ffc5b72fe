"""Results of `HostModel` calls, and its description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from horizon_lm.config import ModelSettings
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.engine.loss import TokenValues
from horizon_lm.errors import NonFiniteError
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.words import count, parameters, size

# Parts of `HostModel.memory_bytes` that are on the device.
_ON_DEVICE = (
    "weight_slots",
    "staging_slots",
    "weight_shards",
    "gradient_slots",
    "gradient_shards",
    "boundary_slots",
)


def _shown(output: Any, **values: Any) -> str:
    """Class and values on one line; floats with six digits, empty values omitted."""
    parts = [
        f"{n}={v:.6g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items() if v not in ("", [])
    ]
    return f"{type(output).__name__}({', '.join(parts)})"


def bytes_of_slots(memory: Mapping[str, int]) -> int:
    """Return the bytes of slots on the device. memory: as `HostModel.memory_bytes` gives it."""
    return sum(memory.get(name, 0) for name in _ON_DEVICE)


def perplexity(loss: float) -> float:
    """Return e to the power of a loss in nats; infinite if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, repr=False)
class ForwardBackwardOutput:
    """Result of `forward_backward`.

    loss: mean cross-entropy over all target tokens of the step (plus the routers' auxiliary loss if the model
    asks for it), or the sum of what your loss function returned. num_tokens: labels that are not ignored.
    metrics: what your loss function returned besides the loss, per micro-batch. router_losses: per
    micro-batch, the routers' auxiliary loss times the model's coefficient, before the weight with which it
    counts in `loss`; empty for models that do not ask for it.
    """

    loss: float
    num_tokens: int
    metrics: list[dict[str, float]] = field(default_factory=list)
    router_losses: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        return _shown(self, loss=self.loss, num_tokens=self.num_tokens, metrics=self._metrics())

    def _metrics(self) -> list[dict[str, float]]:
        return self.metrics if any(self.metrics) else []


@dataclass(frozen=True, repr=False)
class StepOutput:
    """Result of `step`. grad_norm: global L2 norm of the gradients before clipping."""

    grad_norm: float

    def __repr__(self) -> str:
        return _shown(self, grad_norm=self.grad_norm)


@dataclass(frozen=True, repr=False)
class TrainStepOutput(ForwardBackwardOutput):
    """Result of `train_step`: `ForwardBackwardOutput`, and the gradient norm before clipping."""

    grad_norm: float = math.nan

    def __repr__(self) -> str:
        values = {"loss": self.loss, "num_tokens": self.num_tokens, "grad_norm": self.grad_norm}
        return _shown(self, **values, metrics=self._metrics())


@dataclass(frozen=True, repr=False)
class EvaluationOutput:
    """Result of `evaluate`.

    loss: mean cross-entropy in nats over all target tokens. log_probs: on request, log p(label) per
    micro-batch, fp32 [batch, tokens - 1], aligned with labels[:, 1:], 0 where ignored. values: on request,
    `TokenValues` per micro-batch, on the host. With a temperature, all three are those of its distribution.
    router_losses: on request, as in `ForwardBackwardOutput`; not part of the loss.
    """

    loss: float
    num_tokens: int
    log_probs: list[torch.Tensor] | None = None
    values: list[TokenValues] | None = None
    router_losses: list[float] = field(default_factory=list)

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


def describe_model(
    skeleton: Skeleton,
    settings: ModelSettings,
    device: torch.device,
    memory: dict[str, int],
    steps_done: int,
    ranks: Ranks,
) -> str:
    """Model type, parameters, device, dtype, memory by place, and how and when updates run. With several
    ranks, memory is this rank's.

    memory: bytes by part, as `HostModel.memory_bytes` gives them.
    """
    all_parameters = [p for unit in skeleton.units for p in unit.parameters]
    total = sum(p.numel for p in all_parameters)
    trainable = sum(p.numel for p in all_parameters if p.trainable)
    numbers = parameters(total)
    if trainable != total:
        numbers += f" ({parameters(trainable).removesuffix(' parameters')} trainable)"
    kind = type(skeleton.model).__name__
    slots = bytes_of_slots(memory)
    parts = ", ".join(f"{n} {size(b)}" for n, b in memory.items() if b and n not in _ON_DEVICE)
    clipping = f"max_grad_norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    lines = [
        f"{kind} ({skeleton.model_type}), {count(skeleton.num_layers, 'layer')}, {numbers}",
        f"compute: {settings.dtype} on {device}",
        f"host memory: {size(sum(memory.values()) - slots)} ({parts})",
        f"device memory: {size(slots)} in slots" if slots else "device memory: none, the host's is used",
        f"updates: {settings.optim}, {settings.update_mode}, {clipping}; {count(steps_done, 'step')} done",
    ]
    if skeleton.adapter is not None:
        lines.insert(1, f"adapter: {skeleton.adapter.words}")
    if ranks.world > 1:
        lines.append(f"rank {ranks.rank} of {ranks.world}, which hold a share each")
    return "HostModel(\n" + "".join(f"  {line}\n" for line in lines) + ")"


def non_finite_error(
    what: str, out: ForwardBackwardOutput, norm: float, *, updated: int, total: int
) -> NonFiniteError:
    """The error of a step whose loss or gradient is not finite, with its figures.

    updated, total: units that eager updates had reached, and all trainable ones.
    """
    hint = "look for NaN in the model's weights, lower learning_rate, or set nonfinite: skip"
    after = "nothing was updated"
    if updated:
        after = f"{updated} of {total} layers had been updated already (update: eager)"
        hint = "load the last saved model; update: deferred finds this before any update"
    error = NonFiniteError(f"{what}; {after}", hint=hint)
    error.loss, error.grad_norm, error.num_tokens = out.loss, norm, out.num_tokens
    error.state_intact = not updated
    return error
