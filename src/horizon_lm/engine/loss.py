"""Head and loss by chunks of tokens, so that the logits of all tokens never exist at once.

Each chunk runs forward and backward, and its logits are freed, before the next one starts. Losses are
computed from fp32 logits, as in transformers' `ForCausalLMLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional as F

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import ConfigError
from horizon_lm.model.capture import run_head
from horizon_lm.model.skeleton import Skeleton

# Elements of fp32 logits alive at once with `loss_chunk_tokens: auto` on the CPU, and the minimum on a GPU:
# 512 MB, about three times that with their gradient and bf16 copy.
_AUTO_LOGITS = 1 << 27
# On a GPU, fewer, larger chunks read and write the head's weight and gradient less often.
_MOST_TOKENS = 8192
_LOGIT_BYTES = 14  # fp32 and bf16 logits with their gradients, and a softmax's buffers
_DEVICE_PART = 8  # divisor: an eighth of the device's memory, without a plan

# Opens the random state of one pass of a unit over a micro-batch: the same state each time.
Draws = Callable[[], AbstractContextManager[None]]
# (skeleton, hidden [batch, tokens, width], targets [batch, tokens] on the host, the head's random state) ->
# (fp32 scalar on the device, gradient of hidden). Gradients of the head's parameters go to the bound leaves.
HeadLoss = Callable[[Skeleton, torch.Tensor, torch.Tensor, Draws], tuple[torch.Tensor, torch.Tensor]]
# Metrics of a micro-batch; tensors stay on the device until the step has ended.
Metrics = dict[str, float | torch.Tensor]
# (log-probabilities [batch, tokens - 1], micro-batch) -> scalar, or (scalar, metrics)
LossFunction = Callable[[torch.Tensor, dict[str, torch.Tensor]], Any]


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels [batch, tokens], aligned with the inputs, to next-token targets (int64)."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def chunk_tokens(setting: int | str, vocabulary: int, device_bytes: int | None = None) -> int:
    """Return the tokens per loss chunk. device_bytes: memory of the GPU, of which `auto` takes up to an
    eighth; None: the smallest value of `auto`, which is also that of the CPU."""
    if setting != "auto":
        return int(setting)
    *larger, fewest = chunk_choices(vocabulary)
    room = (device_bytes or 0) // _DEVICE_PART
    return next((tokens for tokens in larger if tokens * vocabulary * _LOGIT_BYTES <= room), fewest)


def chunk_choices(vocabulary: int) -> list[int]:
    """List the candidates of `auto` on a GPU, largest first."""
    fewest = max(128, _AUTO_LOGITS // vocabulary)
    halves = [_MOST_TOKENS >> k for k in range(_MOST_TOKENS.bit_length())]
    halves = [tokens for tokens in halves if tokens > fewest]
    return [*halves, fewest]


def _chunks(
    hidden: torch.Tensor, targets: torch.Tensor, chunk: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (slice, hidden [n, width], targets [n] on the device) of each chunk with a target."""
    for start in range(0, hidden.shape[0], chunk):
        place = slice(start, start + chunk)
        wanted = targets[place]
        if bool((wanted != IGNORED).any()):
            yield place, hidden[place].detach(), wanted.to(hidden.device, non_blocking=True)


def cross_entropy(num_tokens: int, chunk: int, label_smoothing: float = 0.0) -> HeadLoss:
    """Build the mean cross-entropy over the `num_tokens` targets of the whole step.

    label_smoothing: epsilon. The loss of a target is (1 - epsilon) times its -log p, plus epsilon times the
    mean of -log p over the vocabulary: transformers' LabelSmoother, computed in fp32.
    """

    def head_loss(
        skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # A tensor: CUDA divides by a Python number by multiplying with its reciprocal, which changes bits.
        divisor = torch.full((), num_tokens, dtype=torch.float32, device=hidden.device)
        flat = hidden.flatten(0, 1)
        gradient = torch.zeros_like(flat)
        with draws():
            for place, piece, wanted in _chunks(flat, targets.flatten(), chunk):
                logits = run_head(skeleton, piece.requires_grad_()).float()
                loss = F.cross_entropy(
                    logits,
                    wanted,
                    ignore_index=IGNORED,
                    reduction="sum",
                    label_smoothing=label_smoothing,
                )
                loss = loss / divisor
                loss.backward()
                total += loss.detach()
                assert piece.grad is not None
                gradient[place] = piece.grad
        return total, gradient.view_as(hidden)

    return head_loss


def log_probabilities(
    skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Compute log p(target) of each token, fp32 [batch, tokens] on the device; 0 for ignored targets.

    hidden: [batch, tokens, width]. targets: [batch, tokens] on the host. The head must be bound.
    """
    flat = hidden.flatten(0, 1)
    found = torch.zeros(flat.shape[0], dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for place, piece, wanted in _chunks(flat, targets.flatten(), chunk):
            found[place] = _log_probability(skeleton, piece, wanted)
    return found.view(targets.shape)


def _log_probability(skeleton: Skeleton, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    logits = run_head(skeleton, hidden).float()
    return -F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")


def check_loss_function(loss_fn: Any, label_smoothing: float) -> None:
    """Raise ConfigError for a loss_fn that is not a function, or that makes label smoothing void."""
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise ConfigError(
            f"loss_fn is a {type(loss_fn).__name__}, not a function",
            hint="pass a function of (log_probs, batch) that returns a scalar tensor",
        )
    if label_smoothing:
        raise ConfigError(
            f"label_smoothing_factor={label_smoothing:g} has no effect on a loss_fn of your own, which "
            "receives the log-probability of each target only",
            hint="label_smoothing_factor=0",
        )


def custom(loss_fn: LossFunction, batch: dict[str, torch.Tensor], chunk: int, metrics: Metrics) -> HeadLoss:
    """Build a head loss from a user's function of log-probabilities.

    Logits are computed twice: for the log-probabilities that `loss_fn` receives, and for its gradient.
    metrics: filled with what it returns besides the loss; `as_numbers` converts them. For a GPU the batch
    should be pinned.
    Raises ConfigError unless it returns a scalar that depends on the log-probabilities.
    """

    def head_loss(
        skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with draws():  # the last token of a row has no target
            leaf = log_probabilities(skeleton, hidden, targets, chunk)[:, :-1].requires_grad_()
        given = {name: value.to(hidden.device, non_blocking=True) for name, value in batch.items()}
        loss, extra = _checked(loss_fn(leaf, given))  # draws from the caller's generators
        metrics.update({str(name): _metric(name, value) for name, value in extra.items()})
        loss.backward()
        if leaf.grad is None:
            raise _no_loss("does not depend on the log-probabilities")
        wanted_gradient = F.pad(leaf.grad, (0, 1)).flatten()
        flat = hidden.flatten(0, 1)
        gradient = torch.zeros_like(flat)
        with draws():  # the same head noise again
            for place, piece, wanted in _chunks(flat, targets.flatten(), chunk):
                found = _log_probability(skeleton, piece.requires_grad_(), wanted)
                found.backward(wanted_gradient[place])
                assert piece.grad is not None
                gradient[place] = piece.grad
        return loss.detach().float(), gradient.view_as(hidden)

    return head_loss


def _metric(name: Any, value: Any) -> float | torch.Tensor:
    """Return the metric as a number, or as a one-element tensor: a copy, without waiting for the device."""
    try:
        if not isinstance(value, torch.Tensor):
            return float(value)
        if value.numel() == 1:
            return value.detach().clone()
    except (TypeError, ValueError):
        pass
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    raise _no_loss(f"returned the metric {name!r} as a {type(value).__name__}{shape}")


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Read the metrics of a micro-batch; waits for the device."""
    return {name: float(value) for name, value in metrics.items()}


def _checked(result: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    loss, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not isinstance(extra, dict):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise _no_loss(f"returned {what}")
    if not loss.requires_grad:
        raise _no_loss("does not depend on the log-probabilities")
    return loss.reshape(()), extra


def _no_loss(reason: str) -> ConfigError:
    return ConfigError(
        f"the loss function {reason}",
        hint="return a scalar tensor made from the log-probabilities, or a pair of it and a dict of metrics",
    )
