"""What one layer takes on the device while it runs, found by running it on tensors without memory.

The same code that trains (`engine.activations`) runs the layer forward and backward on fake tensors, and
what it allocates is counted. Nothing is known of any model family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.activations import backward_layer, forward_layer
from ..engine.compute import forward_prologue
from ..engine.gradient import UnitGradient
from ..memory.live import LiveBytes
from ..memory.slots import UnitWeights
from ..model.skeleton import Skeleton
from ..schedule.step_plan import KEEP, RECOMPUTE


@dataclass(frozen=True)
class WorkingSet:
    """Bytes on the device for one layer and one micro-batch.

    boundary: its input. kept: what it holds between forward and backward when it keeps its activations,
    beside its input. The others are the most that a pass takes, beside the input and (in backward) the
    gradient that comes in, with the gradients of its parameters in a slot: forward and backward when
    activations are computed again, keep_forward and keep_backward when they are kept.
    """

    boundary: int
    kept: int
    forward: int
    backward: int
    keep_forward: int
    keep_backward: int


def layer_working_set(
    skeleton: Skeleton, layer: int, batch: int, tokens: int, device: torch.device | None = None
) -> WorkingSet:
    """The working set of decoder layer `layer` (0-based) on a micro-batch [batch, tokens], unpacked.

    device: where it would run, which decides on the kernels; the CPU by default.
    """
    device = device or torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _, _, forward, backward = _run(skeleton, layer, batch, tokens, device, RECOMPUTE, live)
        boundary, kept, keep_forward, keep_backward = _run(skeleton, layer, batch, tokens, device, KEEP, live)
    return WorkingSet(boundary, kept, forward, backward, keep_forward, keep_backward)


def _run(
    skeleton: Skeleton,
    layer: int,
    batch: int,
    tokens: int,
    device: torch.device,
    policy: str,
    live: LiveBytes,
) -> tuple[int, int, int, int]:
    """(input, held between forward and backward, most in forward, most in backward), in bytes."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    width = skeleton.embedding.embedding_dim
    embeds = torch.empty(batch, tokens, width, dtype=skeleton.dtype, device=device)
    hidden, call = forward_prologue(skeleton, _weights(skeleton, 0, device), embeds, {"input_ids": ids})
    call.routers = [[] for _ in range(layer)]
    weights = _weights(skeleton, layer + 1, device)
    layout = skeleton.units[layer + 1]
    slot = torch.empty(layout.trainable_numel, dtype=torch.float32, device=device)
    before = live.restart()
    done = forward_layer(skeleton, layer, weights, call, hidden, policy=policy, grad=True, in_place=True)
    forward = live.peak - before
    call.routers.append(done.routers)
    held = live.now - before - done.output.nbytes
    incoming = torch.empty_like(done.output)
    graph, output_bytes = done.graph, done.output.nbytes
    assert graph is not None
    del done
    before = live.restart() - held - output_bytes
    backward_layer(skeleton, layer, weights, call, graph, hidden, incoming, UnitGradient(layout, slot))
    return hidden.nbytes, held, forward, live.peak - before - output_bytes


def _weights(skeleton: Skeleton, unit: int, device: torch.device) -> UnitWeights | None:
    layout = skeleton.units[unit]
    if not layout.numel:
        return None
    run = torch.empty(layout.numel, dtype=skeleton.dtype, device=device)
    return UnitWeights(run, torch.empty(layout.wide_numel, dtype=torch.int16, device=device))
