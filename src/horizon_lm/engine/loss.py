"""Head and loss by chunks of tokens, so that the logits of all tokens never exist at once.

Each chunk runs forward and backward, and its logits are freed, before the next one starts. Losses are
computed from fp32 logits, as in transformers' `ForCausalLMLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class TokenValues:
    """Values of the target tokens, each [batch, tokens - 1], aligned with labels[:, 1:] and 0 where ignored.

    They belong to the distribution whose logits are the model's, in fp32, divided by the temperature. All but
    log_probs are None unless asked for. Source: `FusedCausalLMOutput` of TRL.

    Attributes:
        log_probs: log p(label) in nats; gradients flow through it alone.
        entropy: in nats.
        mean_logits: the mean logit of the vocabulary.
        log_sum_sq_probs: log of the sum of p(v)^2.
        is_top1: whether the label has the largest logit; the first one of equals counts as larger (bool).
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    def cpu(self) -> TokenValues:
        """Copy to the host; waits for the device."""
        return TokenValues(**{name: v.cpu() for name, v in vars(self).items() if v is not None})


VALUES = tuple(field.name for field in fields(TokenValues))


class Asked(NamedTuple):
    """What is computed of each target. values: names in `TokenValues` besides log_probs."""

    values: frozenset[str] = frozenset()
    temperature: float = 1.0

    @classmethod
    def of(cls, where: str, values: Sequence[str], temperature: float) -> Asked:
        """Raises ConfigError for unknown names and a temperature that is not above 0."""
        unknown = [values] if isinstance(values, str) else [name for name in values if name not in VALUES]
        if unknown:
            raise ConfigError(
                f"{where}: values: {unknown[0]!r}", hint=f"pass a tuple of names: {', '.join(VALUES)}"
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"{where}: temperature={temperature:g}", hint="pass a number above 0")
        return cls(frozenset(values), float(temperature))


@dataclass(frozen=True)
class TokenLoss:
    """A loss function that is called as function(values, batch), with `TokenValues` of each target.

    It returns a scalar, or a pair of it and a dict of metrics. Raises ConfigError for invalid values.

    Attributes:
        function: the loss function.
        values: names of those it uses besides log_probs.
        temperature: divides the logits before all else.
        router_weight: factor of the routers' auxiliary loss of each micro-batch, if the model asks for that
            loss; None: the micro-batch's share of the step's targets.
    """

    function: Callable[[TokenValues, dict[str, torch.Tensor]], Any]
    values: Sequence[str] = ()
    temperature: float = 1.0
    router_weight: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(
                f"TokenLoss: function is a {type(self.function).__name__}",
                hint="pass a function of (values, batch) that returns a scalar tensor",
            )
        Asked.of("TokenLoss", self.values, self.temperature)

    @property
    def asked(self) -> Asked:
        return Asked.of("TokenLoss", self.values, self.temperature)


# (log-probabilities [batch, tokens - 1], micro-batch) -> scalar, or (scalar, metrics)
LossFunction = Callable[[torch.Tensor, dict[str, torch.Tensor]], Any] | TokenLoss


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


class _Head:
    """The head on one micro-batch, in chunks. The head must be bound.

    hidden: [batch, tokens, width]. targets: [batch, tokens] on the host.
    """

    def __init__(
        self, skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, chunk: int, asked: Asked
    ) -> None:
        self.skeleton, self.asked, self.shape = skeleton, asked, targets.shape
        self.flat = hidden.flatten(0, 1)
        self.chunks = list(_chunks(self.flat, targets.flatten(), chunk))
        # Of the first chunk, from `values` to `gradient`.
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def values(self, *, keep: bool = False) -> TokenValues:
        """Compute the values of all targets, without gradient.

        keep: the first chunk comes last, and keeps its graph for `gradient`.
        """
        found: dict[str, torch.Tensor] = {}
        for name in ("log_probs", *sorted(self.asked.values - {"log_probs"})):
            dtype = torch.bool if name == "is_top1" else torch.float32
            found[name] = torch.zeros(len(self.flat), dtype=dtype, device=self.flat.device)
        first, rest = (self.chunks[:1], self.chunks[1:]) if keep else ([], self.chunks)
        for place, piece, wanted in rest:
            with torch.no_grad():
                values = _values(self.skeleton, piece, wanted, self.asked)
            for name, value in values.items():
                found[name][place] = value
        for place, piece, wanted in first:
            leaf = piece.detach().requires_grad_()
            values = _values(self.skeleton, leaf, wanted, self.asked)
            self._graph = leaf, values["log_probs"]
            for name, value in values.items():
                found[name][place] = value.detach()
        # The last token of a row has no target.
        return TokenValues(**{name: value.view(self.shape)[:, :-1] for name, value in found.items()})

    def gradient(self, of_log_probs: torch.Tensor) -> torch.Tensor:
        """Run all chunks backward from the gradient of log_probs [batch, tokens - 1]; returns that of hidden
        [batch, tokens, width]."""
        outer = F.pad(of_log_probs, (0, 1)).flatten()
        gradient = torch.zeros_like(self.flat)
        log_probs_only = Asked(temperature=self.asked.temperature)
        for place, piece, wanted in self.chunks:
            graph, self._graph = self._graph, None
            if graph is None:
                leaf = piece.detach().requires_grad_()
                graph = leaf, _values(self.skeleton, leaf, wanted, log_probs_only)["log_probs"]
            leaf, found = graph
            found.backward(outer[place])
            assert leaf.grad is not None
            gradient[place] = leaf.grad
            del graph, leaf, found  # before the next chunk has its own
        return gradient.view(*self.shape, -1)


def token_values(
    skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, chunk: int, asked: Asked
) -> TokenValues:
    """Compute the values of each target, on the device and without gradient. The head must be bound.

    hidden: [batch, tokens, width]. targets: [batch, tokens] on the host.
    """
    return _Head(skeleton, hidden, targets, chunk, asked).values()


def _values(
    skeleton: Skeleton, hidden: torch.Tensor, wanted: torch.Tensor, asked: Asked
) -> dict[str, torch.Tensor]:
    """Compute the values of one chunk [n] by name; at most three times its fp32 logits are alive at once."""
    found: dict[str, torch.Tensor] = {}
    logits = run_head(skeleton, hidden).float()
    if asked.temperature != 1.0:
        logits = logits / asked.temperature
    if "mean_logits" in asked.values:
        found["mean_logits"] = logits.detach().mean(-1)
    if "is_top1" in asked.values:
        found["is_top1"] = logits.detach().argmax(-1) == wanted
    log_p = F.log_softmax(logits, dim=-1)
    del logits
    if asked.values & {"entropy", "log_sum_sq_probs"}:
        p = log_p.detach().exp()
        if "log_sum_sq_probs" in asked.values:
            found["log_sum_sq_probs"] = 2 * torch.linalg.vector_norm(p, dim=-1).log()
        if "entropy" in asked.values:
            found["entropy"] = -p.mul_(log_p.detach()).sum(-1)
    found = {name: value.masked_fill(wanted == IGNORED, 0) for name, value in found.items()}
    # As F.cross_entropy, of which these two are the parts.
    found["log_probs"] = -F.nll_loss(log_p, wanted, ignore_index=IGNORED, reduction="none")
    return found


def check_loss_function(loss_fn: Any, label_smoothing: float) -> None:
    """Raise ConfigError for a loss_fn that is not a function, or that makes label smoothing void."""
    if loss_fn is None:
        return
    if not isinstance(loss_fn, TokenLoss) and not callable(loss_fn):
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
    """Build a head loss from a user's function of log-probabilities or `TokenValues`.

    Logits are computed twice, for the values that `loss_fn` receives and for its gradient, except those of
    the first chunk, whose graph is kept in between.
    metrics: filled with what it returns besides the loss; `as_numbers` converts them. For a GPU the batch
    should be pinned.
    Raises ConfigError unless it returns a scalar that depends on the log-probabilities.
    """

    def head_loss(
        skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked = loss_fn.asked if isinstance(loss_fn, TokenLoss) else Asked()
        head = _Head(skeleton, hidden, targets, chunk, asked)
        with draws():
            # A head that draws random numbers must run its chunks in order.
            values = head.values(keep=skeleton.own_head is not None)
        leaf = values.log_probs.requires_grad_()
        given = {name: value.to(hidden.device, non_blocking=True) for name, value in batch.items()}
        result = loss_fn.function(values, given) if isinstance(loss_fn, TokenLoss) else loss_fn(leaf, given)
        loss, extra = _checked(result)  # draws from the caller's generators
        metrics.update({str(name): _metric(name, value) for name, value in extra.items()})
        loss.backward()
        if leaf.grad is None:
            raise _no_loss("does not depend on the log-probabilities")
        with draws():  # the same head noise again
            gradient = head.gradient(leaf.grad)
        return loss.detach().float(), gradient

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
