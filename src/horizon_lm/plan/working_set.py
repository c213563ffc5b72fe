"""Memory and work of prologue, layers and head on the device, measured by running them on fake tensors.

The code that trains (`engine.layers`, `engine.ends`) runs forward and backward on fake
tensors; its allocations and operations are counted. No model family is special.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from horizon_lm.engine.ends import backward_prologue, bound_for_backward, forward_prologue, look_up
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.layers import Layer
from horizon_lm.engine.loss import Asked, Draws, HeadLoss, TokenLoss, cross_entropy, custom, token_values
from horizon_lm.memory.live import LiveBytes
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.anatomy import tensors_in
from horizon_lm.model.capture import Call
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.plan.work import Trace, Work, WorkMeter
from horizon_lm.schedule.step_spec import RECOMPUTE

_FEW_TOKENS = 16  # enough for a prologue, and fast


@dataclass(frozen=True)
class Pass:
    """One op: its peak bytes besides its inputs, and its work."""

    bytes: int
    work: Work


class Passes(NamedTuple):
    """A layer's passes under one policy. held: bytes between forward and backward, besides its input. A
    backward pass excludes the incoming gradient, and its parameters' gradients lie in a slot."""

    held: int
    forward: Pass
    backward: Pass


@dataclass(frozen=True)
class WorkingSet:
    """The working set of one layer and one micro-batch, on the device.

    Policies other than `recompute` are measured on demand: most candidates of the planner recompute all
    layers. boundary: bytes of its input. recomputed: its passes under `recompute`.
    """

    boundary: int
    recomputed: Passes
    measure: Callable[[str], Passes] = field(compare=False)

    @cached_property
    def _measured(self) -> dict[str, Passes]:
        return {RECOMPUTE: self.recomputed}

    def under(self, policy: str) -> Passes:
        """Its passes under a policy of `schedule.step_spec`."""
        if policy not in self._measured:
            self._measured[policy] = self.measure(policy)
        return self._measured[policy]


@dataclass(frozen=True)
class Ends:
    """Prologue and head on one micro-batch. call: bytes of the layers' inputs other than hidden states.

    The look-up uses a table with as many rows as there are tokens; backward includes the gradient of these
    rows. measure_score: the head's forward pass alone, for log-probabilities.
    """

    call: int
    forward: Pass
    backward: Pass
    loss: Pass
    measure_score: Callable[[], Pass] = field(compare=False)

    @cached_property
    def score(self) -> Pass:
        return self.measure_score()


class Built(NamedTuple):
    """A model to measure. mode: that of its fake tensors; None if its tensors are real."""

    skeleton: Skeleton
    mode: FakeTensorMode | None = None


# Readings of a part on [batch, tokens], measured on demand or derived from other shapes.
Measure = Callable[[int, int], Trace]
Source = Callable[[Hashable, int, int, Measure], Sequence[Any]]


def _measured(part: Hashable, batch: int, tokens: int, measure: Measure) -> Sequence[Any]:
    return measure(batch, tokens).readings


def layer_working_set(
    built: Callable[[], Built],
    layer: int,
    batch: int,
    tokens: int,
    device: torch.device | None = None,
    source: Source = _measured,
) -> WorkingSet:
    """Measure decoder layer `layer` (0-based) on a micro-batch [batch, tokens], unpacked.

    built: returns the model, called only to measure. device: decides on the kernels; the CPU by default.
    source: where readings come from; measured by default.
    """

    def readings(policy: str) -> Sequence[Any]:
        def measure(batch: int, tokens: int) -> Trace:
            skeleton, mode = built()
            with _Metered(device, mode) as metered:
                hidden, call = metered.prologue(skeleton, batch, tokens)
                call.routers = [[] for _ in range(layer)]
                metered.size(hidden)
                _run_layer(skeleton, layer, metered, hidden, call, policy)
                return metered.trace

        return source((layer, policy), batch, tokens, measure)

    boundary, recomputed = _layer_figures(readings(RECOMPUTE))
    return WorkingSet(boundary, recomputed, lambda policy: _layer_figures(readings(policy))[1])


def _layer_figures(readings: Sequence[Any]) -> tuple[int, Passes]:
    """(bytes of the input, passes)."""
    _, boundary, _, before, peak, work, now, output, backward_before, backward_peak, backward_work = readings
    held = now - before - output
    forward = Pass(peak - before, work)
    return boundary, Passes(held, forward, Pass(backward_peak - (backward_before - held), backward_work))


class Loss(NamedTuple):
    """chunk: tokens whose logits are alive at once. smoothing: that of the labels. values: those of a
    `TokenLoss`; None: the cross-entropy."""

    chunk: int
    smoothing: float = 0.0
    values: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        if self.values is not None:
            return " ".join(("token values", *self.values))
        return "smoothed" if self.smoothing else "cross-entropy"

    def on_head(self, rows: int) -> HeadLoss:
        if self.values is not None:
            loss = TokenLoss(lambda values, batch: values.log_probs.sum(), self.values)
            return custom(loss, {}, self.chunk, {})
        return cross_entropy(rows, self.chunk, self.smoothing)

    def score(
        self, skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A head loss that computes log-probabilities alone."""
        with draws():
            found = token_values(skeleton, hidden, targets, self.chunk, Asked()).log_probs
        return found, found


def ends_working_set(
    built: Callable[[], Built],
    batch: int,
    tokens: int,
    loss: Loss,
    *,
    has_backward: bool,
    source: Source = _measured,
) -> Ends:
    """Measure prologue and head. The router's auxiliary loss is left out: its logits are few.

    has_backward: whether anything before the layers is trained.
    """

    def measure(batch: int, tokens: int) -> Trace:
        skeleton, mode = built()
        with _Metered(None, mode) as metered:
            table, inputs = metered.table(skeleton, batch, tokens), metered.inputs(batch, tokens)
            weights = metered.weights(skeleton, 0)
            metered.take()
            metered.restart()
            with torch.no_grad():
                embeds = look_up(skeleton, table, inputs["input_ids"])
            hidden, call = forward_prologue(skeleton, weights, embeds, inputs)
            del embeds
            metered.size(hidden)
            metered.peak()
            metered.take()
            if has_backward:
                _prologue_backward(skeleton, metered, table, hidden, call)
            shared = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_in(call.layers)}
            for storage in shared.values():
                metered.trace.read("size", storage.nbytes(), storage.nbytes())
            return metered.trace

    _, before, hidden, peak, work, *rest = source("ends", batch, tokens, measure)
    forward, backward = Pass(max(0, peak - before - hidden), work), Pass(0, Work())
    if has_backward:
        _, before, peak, work, *rest = rest
        backward = Pass(peak - before, work)

    def head(kind: str, made: Callable[[int], HeadLoss]) -> Pass:
        def on(rows: int) -> Pass:
            found = source(("head", kind, loss.chunk), 0, rows, partial(_measure_head, built, made))
            *_, before, peak, work = found
            return Pass(peak - before, work)

        return _head(batch * tokens, hidden // (batch * tokens), loss.chunk, on)

    score = partial(head, "score", lambda rows: loss.score)
    return Ends(sum(rest), forward, backward, head(loss.kind, loss.on_head), score)


class _Metered:
    """A context in which bytes and operations of fake tensors are counted."""

    def __init__(self, device: torch.device | None, mode: FakeTensorMode | None) -> None:
        self.device = device or torch.device("cpu")
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.trace = Trace()
        self.live, self.meter = LiveBytes(self.trace.note), WorkMeter(self.trace.note)

    def __enter__(self) -> _Metered:
        self._stack = ExitStack()
        for context in (self.mode, self.live, self.meter):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    # Readings, which go into the trace.

    def restart(self) -> None:
        self.trace.read("restart", self.live.restart())

    def peak(self) -> None:
        self.trace.read("peak", self.live.peak)

    def now(self) -> None:
        self.trace.read("now", self.live.now)

    def take(self) -> None:
        self.trace.read("take", self.meter.take())

    def size(self, tensor: torch.Tensor) -> None:
        self.trace.read("size", tensor.nbytes, tensor.nbytes)

    def prologue(self, skeleton: Skeleton, batch: int, tokens: int) -> tuple[torch.Tensor, Call]:
        embeds, inputs = without_values(skeleton, batch, tokens, self.device)
        self.take()
        return forward_prologue(skeleton, self.weights(skeleton, 0), embeds, inputs)

    def inputs(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(batch, tokens, dtype=torch.long, device=self.device)}

    def table(self, skeleton: Skeleton, batch: int, tokens: int) -> torch.Tensor:
        width = skeleton.embedding.embedding_dim
        return torch.empty(batch * tokens, width, dtype=skeleton.dtype, device=self.device)

    def weights(self, skeleton: Skeleton, unit: int) -> UnitWeights | None:
        return empty_weights(skeleton, unit, self.device)

    def gradient(self, skeleton: Skeleton, unit: int) -> UnitGradient:
        layout = skeleton.units[unit]
        slot = torch.empty(layout.trainable_numel, dtype=torch.float32, device=self.device)
        return UnitGradient(layout, slot)


def without_values(
    skeleton: Skeleton, batch: int, tokens: int, device: torch.device
) -> tuple[torch.Tensor, dict]:
    """(embeddings [batch, tokens, width], the forward's other inputs)."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    width = skeleton.embedding.embedding_dim
    embeds = torch.empty(batch, tokens, width, dtype=skeleton.dtype, device=device)
    return embeds, {"input_ids": ids}


def empty_weights(skeleton: Skeleton, unit: int, device: torch.device) -> UnitWeights | None:
    """Allocate a unit's weights; None for a unit without any."""
    layout = skeleton.units[unit]
    if not layout.numel:
        return None
    run = torch.empty(layout.numel, dtype=skeleton.dtype, device=device)
    return UnitWeights(run, torch.empty(layout.wide_numel, dtype=torch.int16, device=device))


def _run_layer(
    skeleton: Skeleton, layer: int, metered: _Metered, hidden: torch.Tensor, call: Call, policy: str
) -> None:
    """Take the readings of `_layer_figures`."""
    weights = metered.weights(skeleton, layer + 1)
    gradient = metered.gradient(skeleton, layer + 1)
    metered.take()
    metered.restart()
    run = Layer(skeleton, layer, weights, call)
    done = run.forward(hidden, policy=policy, grad=True, in_place=True)
    metered.peak()
    metered.take()
    call.routers.append(done.routers)
    metered.now()
    metered.size(done.output)
    incoming = torch.empty_like(done.output)
    graph = done.graph
    assert graph is not None
    del done
    metered.restart()
    run.backward(graph, hidden, incoming, gradient)
    metered.peak()
    metered.take()


def _prologue_backward(
    skeleton: Skeleton, metered: _Metered, table: torch.Tensor, hidden: torch.Tensor, call: Call
) -> None:
    weights = metered.weights(skeleton, 0)
    gradient = metered.gradient(skeleton, 0) if skeleton.units[0].trainable_numel else None
    incoming, leaf = torch.empty_like(hidden), table.detach().requires_grad_(skeleton.embedding_trainable)
    metered.take()
    metered.restart()
    with torch.enable_grad():
        embeds = look_up(skeleton, leaf, call.inputs["input_ids"])
    backward_prologue(skeleton, weights, embeds, call, incoming, gradient)
    metered.peak()
    metered.take()


def _head(rows: int, row_bytes: int, loss_chunk: int, head: Callable[[int], Pass]) -> Pass:
    """Measure two chunks of the loss; the others count as the second."""
    one = head(min(rows, loss_chunk))
    chunks = -(-rows // loss_chunk)
    if chunks == 1:
        return one
    two = head(min(rows, 2 * loss_chunk))
    work = Work(one.work)
    for kernel, count in two.work.items():
        work[kernel] += (count - one.work[kernel]) * (chunks - 1)
    # The gradient passed to the last layer grows with the rows.
    rest = max(0, rows - 2 * loss_chunk) * row_bytes
    return Pass(max(one.bytes, two.bytes) + rest, Work({k: n for k, n in work.items() if n > 0}))


def _measure_head(built: Callable[[], Built], made: Callable[[int], HeadLoss], _: int, rows: int) -> Trace:
    skeleton, mode = built()
    with _Metered(None, mode) as metered:
        like, call = metered.prologue(skeleton, 1, _FEW_TOKENS)  # not all are as wide as the table
        del call
        _head_on(skeleton, metered, like, rows, made(rows))
        return metered.trace


def _head_on(
    skeleton: Skeleton, metered: _Metered, like: torch.Tensor, rows: int, head_loss: HeadLoss
) -> None:
    head = skeleton.head
    weights = metered.weights(skeleton, head)
    gradient = metered.gradient(skeleton, head) if skeleton.units[head].trainable_numel else None
    hidden = torch.empty(1, rows, *like.shape[2:], dtype=like.dtype, device=like.device)
    targets = torch.zeros(1, rows, dtype=torch.long)
    metered.take()
    metered.restart()
    with torch.enable_grad(), bound_for_backward(skeleton, head, weights, gradient):
        head_loss(skeleton, hidden, targets, nullcontext)
    metered.peak()
    metered.take()
