"""One decoder layer, forward and backward, and its autograd graph in between.

The forward pass builds the graph. Under `recompute` the graph only knows how to compute its saved tensors
again (`torch.utils.checkpoint`, which stops at the last one needed); under `keep` it holds them; under
`attention` and `products` it holds what is costly to compute again (`engine.selective`). It never holds the
layer's weights, which will be in another slot by then, nor an input that is stored elsewhere.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.dlpack import from_dlpack, to_dlpack

from horizon_lm.engine.gradient import UnitGradient, collecting
from horizon_lm.engine.selective import Selection
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.capture import Call, RouterLogits, capture_routers, run_layer
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.schedule.step_spec import ATTENTION, KEEP, PRODUCTS, RECOMPUTE


@dataclass
class _Box:
    """A layer's input while the layer runs; afterwards the input's gradient."""

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
    """Location of a saved weight: in a run of the unit's weights (its number), or in the wide parameter of
    this name."""

    place: int | str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Weights:
    """Saved-tensor hooks that replace weights by handles, and handles by the current weights."""

    def __init__(self, runs: list[torch.Tensor], bound: dict[str, torch.Tensor]) -> None:
        self._runs = runs
        self._numbers = {_storage_of(run): number for number, run in enumerate(runs)}
        storages = {name: _storage_of(tensor) for name, tensor in bound.items()}
        self._wide = {storage: name for name, storage in storages.items() if storage not in self._numbers}
        self.unbindable: torch.dtype | None = None
        self._now: tuple[list[torch.Tensor], dict[str, torch.Tensor]] | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Handle:
        storage = _storage_of(tensor)
        if storage in self._numbers:
            number = self._numbers[storage]
            run = self._runs[number]
            if tensor.dtype != run.dtype:  # the same bytes under another type
                self.unbindable = tensor.dtype
                return tensor
            offset = int(tensor.storage_offset() - run.storage_offset())
            return _Handle(number, offset, tensor.shape, tensor.stride())
        if storage in self._wide:
            return _Handle(self._wide[storage], int(tensor.storage_offset()), tensor.shape, tensor.stride())
        # Detached: an output saved by its own node would form a cycle with it, and a graph that is never run
        # backward (a failed step) would never be freed.
        return tensor.detach()

    def unpack(self, saved: torch.Tensor | _Handle) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        assert self._now is not None, "a backward pass without its weights"
        runs, wide = self._now
        base = runs[saved.place] if isinstance(saved.place, int) else wide[saved.place]
        return base.as_strided(saved.shape, saved.stride, saved.offset + base.storage_offset())

    @contextmanager
    def rebound(self, runs: list[torch.Tensor], bound: dict[str, torch.Tensor]) -> Iterator[None]:
        """While open, resolve handles to these weights."""
        self._now = runs, {name: tensor.detach() for name, tensor in bound.items()}
        try:
            yield
        finally:
            self._now = None


@dataclass
class LayerGraph:
    """The autograd graph of one layer on one micro-batch, between its forward and its backward.

    output: the graph's end without the tensor, which may be spilled. leaves: the bound trainable
    parameters. saved: hooks of a layer that keeps its activations.
    """

    output: GradientEdge
    leaves: dict[str, torch.Tensor]
    routers: list[RouterLogits]
    box: _Box
    saved: _Weights | None = None


@dataclass(frozen=True)
class Rerun:
    """Stands for the graph of a layer that stored weights where they cannot be replaced, or runs compiled.

    Its backward pass reruns the whole layer. reason: what the layer does, in words; None for a compiled
    layer that is recomputed anyway. Its graph cannot stop early, and a rerun may save other tensors than
    `checkpoint` counted (if another length was compiled meanwhile).
    """

    reason: str | None


_CHECKPOINTED = frozenset({RECOMPUTE, ATTENTION, PRODUCTS})
_PUT_ASIDE = "its forward pass stores a weight outside of autograd's saved tensors"


@dataclass
class LayerForward:
    """Result of a layer's forward pass. graph: None if the policy leaves none."""

    output: torch.Tensor
    graph: LayerGraph | Rerun | None
    routers: list[RouterLogits] = field(default_factory=list)


class Layer(NamedTuple):
    """Decoder layer `number` (0-based) with its weights, in whatever slot they are now, and its arguments."""

    skeleton: Skeleton
    number: int
    weights: UnitWeights | None
    call: Call

    def forward(
        self, hidden: torch.Tensor, *, policy: str, grad: bool, in_place: bool = False, reruns: bool = False
    ) -> LayerForward:
        """Run the layer on hidden [batch, tokens, width].

        policy: one of `schedule.step_spec`'s, or nothing. grad: enable gradients even if no graph is left, so
        the same kernels run as in the backward pass. in_place: the backward pass follows before the slot is
        reused, so it does not matter where the layer keeps its weights. reruns: the layer is known to store
        weights where they cannot be replaced.
        """
        if policy in _CHECKPOINTED and self.skeleton.is_compiled(self.number):
            done = self.forward(hidden, policy="", grad=grad)
            return replace(done, graph=Rerun(None))
        skeleton, weights, box, saved = self.skeleton, self.weights, _Box(hidden), None
        if weights is not None and policy and not in_place:
            weights = _private_weights(weights)
        shared = _sharing([] if weights is None else weights.runs)
        with (
            torch.set_grad_enabled(grad),
            skeleton.bound(self.number + 1, weights, grad=grad, aliased=bool(policy)) as bound,
            capture_routers(skeleton, self.number) as routers,
        ):
            if policy == KEEP and weights is not None:
                saved = _Weights(weights.runs, bound)
            output = self._run(box, policy, grad, saved)
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
                return LayerForward(
                    output, Rerun(f"its forward pass saves a weight's bytes as {kind}"), plain
                )
            if _has_put_aside(weights, leaves, shared, is_known=reruns):
                return LayerForward(output, Rerun(_PUT_ASIDE), plain)
        return LayerForward(output, graph, plain)

    def _run(self, box: _Box, policy: str, grad: bool, saved: _Weights | None) -> torch.Tensor:
        """The layer's output, with the graph that the policy asks for; its weights must be bound."""
        assert box.hidden is not None
        if not policy and not grad:
            return run_layer(self.skeleton, self.number, self.call, box.hidden)
        root = torch.zeros((), device=box.hidden.device, requires_grad=grad)
        run = partial(_run_on_entry, self.skeleton, self.number, self.call, box)
        if policy in _CHECKPOINTED:
            return self._checkpointed(run, root, policy)
        hooks = nullcontext()
        if not policy:
            hooks = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)  # type: ignore[assignment]
        elif saved is not None:
            hooks = saved_tensors_hooks(saved.pack, saved.unpack)  # type: ignore[assignment]
        with hooks:
            return run(root)

    def _checkpointed(
        self, run: Callable[[torch.Tensor], torch.Tensor], root: torch.Tensor, policy: str
    ) -> torch.Tensor:
        """The output of `run`, with a graph that recomputes it, except for what the policy keeps."""
        call = partial(checkpoint, run, root, use_reentrant=False, preserve_rng_state=False)
        if policy == RECOMPUTE or not root.requires_grad:
            output: torch.Tensor = call()
            return output
        selection = Selection(policy, f"layer {self.number}")
        output = call(context_fn=selection.contexts)
        selection.finish(output)
        return output

    def backward(
        self,
        graph: LayerGraph | Rerun,
        hidden: torch.Tensor,
        output_gradient: torch.Tensor,
        gradient: UnitGradient | None,
    ) -> torch.Tensor:
        """Run the layer's graph backward, recomputing what it does not hold.

        hidden: the layer's input [batch, tokens, width]. Returns its gradient.
        """
        if isinstance(graph, Rerun):
            again = self.forward(hidden, policy=KEEP, grad=True, in_place=True).graph
            assert isinstance(again, LayerGraph)
            graph = again
        roots = [graph.output, *(get_gradient_edge(r.logits) for r in graph.routers)]
        gradients = [output_gradient]
        if graph.routers:
            gradients += [r.logits for r in self.call.routers[self.number]]
        graph.box.hidden = hidden
        unit = self.number + 1
        with (
            self.skeleton.bound(unit, self.weights, grad=True) as bound,
            collecting(self.skeleton, unit, graph.leaves, gradient),
            graph.saved.rebound(self.weights.runs, bound)
            if graph.saved is not None and self.weights is not None
            else nullcontext(),
        ):
            torch.autograd.backward(roots, gradients)
        graph.box.hidden = None
        return torch.zeros_like(hidden) if graph.box.gradient is None else graph.box.gradient


def _has_put_aside(
    weights: UnitWeights, leaves: dict[str, torch.Tensor], shared: int, *, is_known: bool
) -> bool:
    """Whether a layer still holds weights, other than its leaves, after its forward pass.

    shared: tensors over the weights' storages before it. The count is exact: the storages are private to this
    pass (`_private`), so no other thread adds to them, and garbage in cycles is collected first.
    """
    flat = {_storage_of(run) for run in weights.runs}
    tensors = [*weights.runs, *(t for t in leaves.values() if _storage_of(t) not in flat)]

    def is_more() -> bool:
        return _sharing(tensors) - shared > len(leaves)

    if is_more() and not is_known:
        gc.collect()
    return is_more()


def _private_weights(weights: UnitWeights) -> UnitWeights:
    """The same weights in runs that are known to this pass only."""
    more = tuple((begin, _private(run)) for begin, run in weights.more)
    return weights._replace(weights=_private(weights.weights), more=more)


def _private(run: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage known to this pass only: users of the store's storage (a checkpoint
    being written, views a caller holds) come and go in other threads."""
    return from_dlpack(to_dlpack(run.detach()))


def _run_on_entry(skeleton: Skeleton, layer: int, call: Call, box: _Box, root: torch.Tensor) -> torch.Tensor:
    return run_layer(skeleton, layer, call, _Entry.apply(root, box))


def _storage_of(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor; unlike its address, fake tensors have it too."""
    return tensor.untyped_storage()._cdata


def _sharing(tensors: list[torch.Tensor]) -> int:
    """Number of tensors over the memory behind these, themselves and their bases included."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum(torch._C._storage_Use_Count(s._cdata) - 1 for s in storages)  # type: ignore[attr-defined]
