"""One layer between its forward and its backward: what it leaves behind, and how the rest comes back.

A layer's autograd graph is built in its forward pass. Under `recompute` it holds nothing but the way to
compute its saved tensors again (`torch.utils.checkpoint`, which also stops at the last one needed); under
`keep` it holds them. In both cases it holds neither the layer's weights, which are in some slot now
and in another one later, nor its input where that is stored elsewhere.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.dlpack import from_dlpack, to_dlpack

from horizon_lm.engine.gradient import UnitGradient, collecting
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.capture import Call, RouterLogits, capture_routers, run_layer
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.schedule.step_plan import KEEP, RECOMPUTE


@dataclass
class _Box:
    """A layer's input while it runs, and afterwards the input's gradient."""

    hidden: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class _Entry(torch.autograd.Function):
    """The layer's input as a node that holds no tensor: a leaf would keep its memory alive."""

    @staticmethod
    def forward(ctx: Any, root: torch.Tensor, box: _Box) -> torch.Tensor:  # type: ignore[override]
        assert box.hidden is not None, "a layer is computed again without its input"
        ctx.box = box
        return box.hidden.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.box.gradient = gradient  # type: ignore[attr-defined]
        return None, None


class _Handle(NamedTuple):
    """Where a saved weight lies: in the unit's run (name None), or in the wide parameter `name`."""

    name: str | None
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Weights:
    """Saved-tensor hooks that put handles in place of weights, and weights of now in place of handles."""

    def __init__(self, run: torch.Tensor, bound: dict[str, torch.Tensor]) -> None:
        self._run = run
        self.storage = _storage_of(run)
        storages = {name: _storage_of(tensor) for name, tensor in bound.items()}
        self._wide = {storage: name for name, storage in storages.items() if storage != self.storage}
        self.unbindable: torch.dtype | None = None
        self._now: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Handle:
        storage = _storage_of(tensor)
        if storage == self.storage:
            if tensor.dtype != self._run.dtype:  # the same bytes under another type
                self.unbindable = tensor.dtype
                return tensor
            offset = int(tensor.storage_offset() - self._run.storage_offset())
            return _Handle(None, offset, tensor.shape, tensor.stride())
        if storage in self._wide:
            return _Handle(self._wide[storage], int(tensor.storage_offset()), tensor.shape, tensor.stride())
        # Detached: an output that its own node saves would hold the node, which holds it, and a graph that
        # is never run backward (a step that fails) would stay in memory for ever.
        return tensor.detach()

    def unpack(self, saved: torch.Tensor | _Handle) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        assert self._now is not None, "a backward pass without its weights"
        run, wide = self._now
        base = run if saved.name is None else wide[saved.name]
        return base.as_strided(saved.shape, saved.stride, saved.offset + base.storage_offset())

    @contextmanager
    def rebound(self, run: torch.Tensor, bound: dict[str, torch.Tensor]) -> Iterator[None]:
        """While open, handles stand for these weights."""
        self._now = run, {name: tensor.detach() for name, tensor in bound.items()}
        try:
            yield
        finally:
            self._now = None


@dataclass
class LayerGraph:
    """The autograd graph of one layer on one micro-batch, between its forward and its backward.

    output: the graph's end, without the tensor, which may be spilled; leaves: the trainable parameters
    that were bound; saved: the hooks of a layer that keeps its activations.
    """

    output: GradientEdge
    leaves: dict[str, torch.Tensor]
    routers: list[RouterLogits]
    box: _Box
    saved: _Weights | None = None


@dataclass(frozen=True)
class Rerun:
    """Replaces the graph of a layer that stored weights where they cannot be replaced: its backward pass
    runs the whole layer again. reason: what the layer does, in words."""

    reason: str


_PUT_ASIDE = "its forward pass stores a weight outside of autograd's saved tensors"


@dataclass
class LayerForward:
    """What a layer's forward pass gives. graph: None where the policy leaves none."""

    output: torch.Tensor
    graph: LayerGraph | Rerun | None
    routers: list[RouterLogits] = field(default_factory=list)


def forward_layer(
    skeleton: Skeleton,
    layer: int,
    weights: UnitWeights | None,
    call: Call,
    hidden: torch.Tensor,
    *,
    policy: str,
    grad: bool,
    in_place: bool = False,
    reruns: bool = False,
) -> LayerForward:
    """Run decoder layer `layer` (0-based) on hidden [batch, tokens, width].

    policy: `recompute`, `keep`, or nothing. grad: run with gradients on even where no graph is left, so
    that the same kernels run as in the backward pass. in_place: the backward pass follows before anything
    else is put into the slot, so that it does not matter where the layer keeps its weights. reruns: this
    layer is known to store weights where they cannot be replaced.
    """
    box, saved = _Box(hidden), None
    if weights is not None and policy and not in_place:
        weights = weights._replace(weights=_private(weights.weights))
    shared = _sharing([] if weights is None else [weights.weights])
    with (
        torch.set_grad_enabled(grad),
        skeleton.bound(layer + 1, weights, grad=grad, aliased=bool(policy)) as bound,
        capture_routers(skeleton, layer) as routers,
    ):
        root = torch.zeros((), device=hidden.device, requires_grad=grad)
        run = partial(_run, skeleton, layer, call, box)
        if policy == RECOMPUTE:
            output = checkpoint(run, root, use_reentrant=False, preserve_rng_state=False)
        elif policy == KEEP:
            hooks = nullcontext()
            if weights is not None:
                saved = _Weights(weights.weights, bound)
                hooks = saved_tensors_hooks(saved.pack, saved.unpack)  # type: ignore[assignment]
            with hooks:
                output = run(root)
        elif grad:
            with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                output = run(root)
        else:
            output = run_layer(skeleton, layer, call, hidden)
    plain = [r._replace(logits=r.logits.detach()) for r in routers]
    if not policy:
        return LayerForward(output.detach(), None, plain)
    box.hidden = None
    leaves = {name: tensor for name, tensor in bound.items() if tensor.requires_grad}
    bound.clear()
    graph = LayerGraph(get_gradient_edge(output), leaves, routers, box, saved)
    output = output.detach()
    if weights is not None and not in_place:
        if saved is not None and saved.unbindable is not None:
            kind = str(saved.unbindable).removeprefix("torch.")
            return LayerForward(output, Rerun(f"its forward pass saves a weight's bytes as {kind}"), plain)
        if _has_put_aside(weights, leaves, shared, is_known=reruns):
            return LayerForward(output, Rerun(_PUT_ASIDE), plain)
    return LayerForward(output, graph, plain)


def _has_put_aside(
    weights: UnitWeights, leaves: dict[str, torch.Tensor], shared: int, *, is_known: bool
) -> bool:
    """Whether a layer still holds weights after its forward pass, beside its leaves.

    shared: tensors over the run before it. The count is exact: the run's storage is private to this pass
    (`_private`), so no other thread adds to it, and garbage in cycles is collected before it is believed.
    """
    flat = _storage_of(weights.weights)
    tensors = [weights.weights, *(t for t in leaves.values() if _storage_of(t) != flat)]

    def is_more() -> bool:
        return _sharing(tensors) - shared > len(leaves)

    if is_more() and not is_known:
        gc.collect()
    return is_more()


def _private(run: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of its own, which only this pass knows: users of the store's storage
    (a checkpoint being written, views that a caller holds) come and go at any time, in other threads."""
    return from_dlpack(to_dlpack(run.detach()))


def _run(skeleton: Skeleton, layer: int, call: Call, box: _Box, root: torch.Tensor) -> torch.Tensor:
    return run_layer(skeleton, layer, call, _Entry.apply(root, box))


def _storage_of(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor; unlike its address also known of fake tensors."""
    return tensor.untyped_storage()._cdata


def _sharing(tensors: list[torch.Tensor]) -> int:
    """How many tensors there are over the memory behind these, themselves and their bases included."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum(torch._C._storage_Use_Count(s._cdata) - 1 for s in storages)  # type: ignore[attr-defined]


def backward_layer(
    skeleton: Skeleton,
    layer: int,
    weights: UnitWeights | None,
    call: Call,
    graph: LayerGraph | Rerun,
    hidden: torch.Tensor,
    output_gradient: torch.Tensor,
    gradient: UnitGradient | None,
) -> torch.Tensor:
    """Run the layer's graph backward, computing again what it does not hold, and return the gradient of
    the layer's input [batch, tokens, width].

    hidden: that input; weights: the unit's weights, in whatever slot they are now.
    """
    if isinstance(graph, Rerun):
        again = forward_layer(
            skeleton, layer, weights, call, hidden, policy=KEEP, grad=True, in_place=True
        ).graph
        assert isinstance(again, LayerGraph)
        graph = again
    roots = [graph.output, *(get_gradient_edge(r.logits) for r in graph.routers)]
    gradients = [output_gradient]
    if graph.routers:
        gradients += [r.logits for r in call.routers[layer]]
    graph.box.hidden = hidden
    with (
        skeleton.bound(layer + 1, weights, grad=True) as bound,
        collecting(skeleton, layer + 1, graph.leaves, gradient),
        graph.saved.rebound(weights.weights, bound)
        if graph.saved is not None and weights is not None
        else nullcontext(),
    ):
        torch.autograd.backward(roots, gradients)
    graph.box.hidden = None
    return torch.zeros_like(hidden) if graph.box.gradient is None else graph.box.gradient
