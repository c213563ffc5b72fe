"""What prologue, layers and head take and do on the device, found by running them on tensors without memory.

The same code that trains (`engine.activations`, `engine.compute`) runs forward and backward on fake
tensors; what it allocates and what it computes is counted. Nothing is known of any model family.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.activations import backward_layer, forward_layer
from ..engine.compute import backward_prologue, bound_for_backward, forward_prologue
from ..engine.gradient import UnitGradient
from ..engine.loss import HeadLoss, cross_entropy
from ..memory.live import LiveBytes
from ..memory.slots import UnitWeights
from ..model.anatomy import tensors_in
from ..model.capture import Call
from ..model.skeleton import Skeleton
from ..schedule.step_plan import KEEP, RECOMPUTE
from .work import Work, WorkMeter


@dataclass(frozen=True)
class Pass:
    """One op: the most bytes it takes beside what it is given, and what it computes."""

    bytes: int
    work: Work


@dataclass(frozen=True)
class WorkingSet:
    """Of one layer and one micro-batch, on the device.

    What it takes when it keeps its activations is measured when it is asked for (`measure_kept`): most of
    what the planner looks at recomputes all layers.

    boundary: bytes of its input. kept, held: what it holds between forward and backward, beside its input,
    when it keeps its activations and when it computes them again. The others are its passes; the bytes of
    a backward pass are beside the gradient that comes in, with those of its parameters in a slot.
    """

    boundary: int
    held: int
    forward: Pass
    backward: Pass
    measure_kept: Callable[[], tuple[int, Pass, Pass]] = field(compare=False)

    @cached_property
    def _kept(self) -> tuple[int, Pass, Pass]:
        return self.measure_kept()

    @property
    def kept(self) -> int:
        return self._kept[0]

    @property
    def keep_forward(self) -> Pass:
        return self._kept[1]

    @property
    def keep_backward(self) -> Pass:
        return self._kept[2]


@dataclass(frozen=True)
class Ends:
    """Prologue and head on one micro-batch. call: bytes of what the layers receive beside hidden states."""

    call: int
    forward: Pass
    backward: Pass
    loss: Pass


def layer_working_set(
    skeleton: Skeleton,
    layer: int,
    batch: int,
    tokens: int,
    device: torch.device | None = None,
    mode: FakeTensorMode | None = None,
) -> WorkingSet:
    """The working set of decoder layer `layer` (0-based) on a micro-batch [batch, tokens], unpacked.

    device: where it would run, which decides on the kernels; the CPU by default. mode: that of a skeleton
    which was built from fake tensors.
    """

    def measure(policy: str) -> tuple[int, tuple[int, Pass, Pass]]:
        with _Metered(device, mode) as metered:
            hidden, call = metered.prologue(skeleton, batch, tokens)
            call.routers = [[] for _ in range(layer)]
            return hidden.nbytes, _run_layer(skeleton, layer, metered, hidden, call, policy)

    boundary, (held, forward, backward) = measure(RECOMPUTE)
    return WorkingSet(boundary, held, forward, backward, lambda: measure(KEEP)[1])


def ends_working_set(
    skeleton: Skeleton,
    batch: int,
    tokens: int,
    loss_chunk: int,
    device: torch.device | None = None,
    mode: FakeTensorMode | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Ends:
    """What prologue and head take. The router's auxiliary loss is left out: its logits are few."""
    with _Metered(device, mode) as metered:
        before = metered.live.restart()
        hidden, call = metered.prologue(skeleton, batch, tokens)
        forward = Pass(max(0, metered.live.peak - before - hidden.nbytes), metered.meter.take())
        shared = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(call.layers)}
        backward = Pass(0, Work())
        if any(u.trainable_numel for u in (skeleton.units[0], skeleton.units[skeleton.embedding_unit])):
            backward = _prologue_backward(skeleton, metered, hidden, batch, tokens)
        head_loss = partial(cross_entropy, chunk=loss_chunk, label_smoothing=label_smoothing)
        loss = _head(skeleton, metered, hidden, loss_chunk, head_loss)
    return Ends(sum(shared.values()), forward, backward, loss)


class _Metered:
    """Fake tensors whose bytes and operations are counted."""

    def __init__(self, device: torch.device | None, mode: FakeTensorMode | None) -> None:
        self.device = device or torch.device("cpu")
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.meter = LiveBytes(), WorkMeter()

    def __enter__(self) -> _Metered:
        self._stack = ExitStack()
        for context in (self.mode, self.live, self.meter):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def prologue(self, skeleton: Skeleton, batch: int, tokens: int) -> tuple[torch.Tensor, Call]:
        embeds, inputs = self.inputs(skeleton, batch, tokens)
        self.meter.take()
        return forward_prologue(skeleton, self.weights(skeleton, 0), embeds, inputs)

    def inputs(self, skeleton: Skeleton, batch: int, tokens: int) -> tuple[torch.Tensor, dict]:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=self.device)
        width = skeleton.embedding.embedding_dim
        embeds = torch.empty(batch, tokens, width, dtype=skeleton.dtype, device=self.device)
        return embeds, {"input_ids": ids}

    def weights(self, skeleton: Skeleton, unit: int) -> UnitWeights | None:
        layout = skeleton.units[unit]
        if not layout.numel:
            return None
        run = torch.empty(layout.numel, dtype=skeleton.dtype, device=self.device)
        return UnitWeights(run, torch.empty(layout.wide_numel, dtype=torch.int16, device=self.device))

    def gradient(self, skeleton: Skeleton, unit: int) -> UnitGradient:
        layout = skeleton.units[unit]
        slot = torch.empty(layout.trainable_numel, dtype=torch.float32, device=self.device)
        return UnitGradient(layout, slot)


def _run_layer(
    skeleton: Skeleton, layer: int, metered: _Metered, hidden: torch.Tensor, call: Call, policy: str
) -> tuple[int, Pass, Pass]:
    """(bytes held between forward and backward, forward, backward)."""
    live, meter = metered.live, metered.meter
    weights = metered.weights(skeleton, layer + 1)
    gradient = metered.gradient(skeleton, layer + 1)
    meter.take()
    before = live.restart()
    done = forward_layer(skeleton, layer, weights, call, hidden, policy=policy, grad=True, in_place=True)
    forward = Pass(live.peak - before, meter.take())
    call.routers.append(done.routers)
    held = live.now - before - done.output.nbytes
    incoming = torch.empty_like(done.output)
    graph, output_bytes = done.graph, done.output.nbytes
    assert graph is not None
    del done
    before = live.restart() - held - output_bytes
    backward_layer(skeleton, layer, weights, call, graph, hidden, incoming, gradient)
    return held, forward, Pass(live.peak - before - output_bytes, meter.take())


def _prologue_backward(
    skeleton: Skeleton, metered: _Metered, hidden: torch.Tensor, batch: int, tokens: int
) -> Pass:
    weights = metered.weights(skeleton, 0)
    gradient = metered.gradient(skeleton, 0) if skeleton.units[0].trainable_numel else None
    embeds, inputs = metered.inputs(skeleton, batch, tokens)
    incoming = torch.empty_like(hidden)
    metered.meter.take()
    before = metered.live.restart()
    backward_prologue(skeleton, weights, embeds, inputs, incoming, gradient)
    return Pass(metered.live.peak - before, metered.meter.take())


def _head(
    skeleton: Skeleton,
    metered: _Metered,
    hidden: torch.Tensor,
    loss_chunk: int,
    head_loss: Callable[[int], HeadLoss],
) -> Pass:
    """Chunks of the loss are alike, so two are run and the others are counted as the second."""
    rows = hidden.shape[0] * hidden.shape[1]
    one = _head_on(skeleton, metered, hidden, min(rows, loss_chunk), head_loss)
    chunks = -(-rows // loss_chunk)
    if chunks == 1:
        return one
    two = _head_on(skeleton, metered, hidden, min(rows, 2 * loss_chunk), head_loss)
    work = Work(one.work)
    for kernel, count in two.work.items():
        work[kernel] += (count - one.work[kernel]) * (chunks - 1)
    # What grows with the rows is the gradient that goes down to the last layer.
    rest = max(0, rows - 2 * loss_chunk) * hidden[0, 0].numel() * hidden.itemsize
    return Pass(max(one.bytes, two.bytes) + rest, Work({k: n for k, n in work.items() if n > 0}))


def _head_on(
    skeleton: Skeleton,
    metered: _Metered,
    like: torch.Tensor,
    rows: int,
    head_loss: Callable[[int], HeadLoss],
) -> Pass:
    head = skeleton.head
    weights = metered.weights(skeleton, head)
    gradient = metered.gradient(skeleton, head) if skeleton.units[head].trainable_numel else None
    hidden = torch.empty(1, rows, *like.shape[2:], dtype=like.dtype, device=like.device)
    targets = torch.zeros(1, rows, dtype=torch.long)
    metered.meter.take()
    before = metered.live.restart()
    with torch.enable_grad(), bound_for_backward(skeleton, head, weights, gradient):
        head_loss(rows)(skeleton, hidden, targets)
    return Pass(metered.live.peak - before, metered.meter.take())
