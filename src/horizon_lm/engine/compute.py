"""Forward, and recompute + backward, of one unit on one micro-batch; embedding rows on the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..memory.layout import Parameter, UnitLayout
from ..memory.slots import UnitWeights
from ..model.capture import Call, RouterLogits, capture_routers, run_layer, run_prologue, run_router_loss
from ..model.skeleton import Skeleton
from .loss import head_loss
from .transfer import download_gradient


class UnitGradient:
    """The gradient of one unit while it is accumulated in a slot.

    Parameters that received nothing (an expert without tokens) are zeros in their own place.
    at_home: the slot is the store's own run and of its dtype, so that nothing is left to download.
    """

    def __init__(self, layout: UnitLayout, run: torch.Tensor, *, at_home: bool = False) -> None:
        self.layout = layout
        self.run = run  # [trainable_numel]
        self.at_home = at_home
        self.written: set[str] = set()

    def add(self, parameter: Parameter, gradient: torch.Tensor) -> None:
        view = self.layout.trainable_view(self.run, parameter)
        if parameter.name in self.written:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self.written.add(parameter.name)

    def download(self, home: torch.Tensor) -> torch.Tensor | None:
        """Bring the complete gradient to the store's run `home` and return its squared norm; None
        where it is at home, and is measured when the norm is asked for."""
        for parameter in self.layout.trainable:
            if parameter.name not in self.written:
                self.layout.trainable_view(self.run, parameter).zero_()
        for start, length in self.layout.gaps():
            self.run.narrow(0, start, length).zero_()
        return None if self.at_home else download_gradient(self.run, home)


@contextmanager
def collecting(
    skeleton: Skeleton, unit: int, leaves: dict[str, torch.Tensor], gradient: UnitGradient | None
) -> Iterator[None]:
    """While open, gradients of the unit's leaves move into its slot as soon as they exist."""
    handles = []
    for parameter in skeleton.units[unit].trainable:
        assert gradient is not None

        def collect(leaf: torch.Tensor, parameter: Parameter = parameter) -> None:
            assert leaf.grad is not None
            gradient.add(parameter, leaf.grad)
            leaf.grad = None

        handles.append(leaves[parameter.name].register_post_accumulate_grad_hook(collect))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bound_for_backward(
    skeleton: Skeleton, unit: int, weights: UnitWeights | None, gradient: UnitGradient | None
) -> Iterator[None]:
    """The unit's weights bound as leaves whose gradients are collected."""
    with skeleton.bound(unit, weights, grad=True) as leaves, collecting(skeleton, unit, leaves, gradient):
        yield


def forward_prologue(
    skeleton: Skeleton, weights: UnitWeights | None, embeds: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Call]:
    """Layer 0's input [batch, tokens, width] and what the layers receive beside it."""
    with torch.no_grad(), skeleton.bound(0, weights, grad=False):
        first, call = run_prologue(skeleton, embeds, inputs)
    # A buffer of its own, also when the prologue changes nothing: `embeds` has another lifetime.
    return embeds.clone() if first is None else first, call


@dataclass
class LayerGraph:
    """The autograd graph of one layer on one micro-batch, between its forward and its backward.

    What the graph would save is not kept but computed again in backward, with the weights bound
    then (`torch.utils.checkpoint`, which also stops the recompute at the last tensor needed),
    except at the turn.

    output: [batch, tokens, width]; hidden: the leaf it started from; leaves: the parameters.
    """

    output: torch.Tensor
    hidden: torch.Tensor
    leaves: dict[str, torch.Tensor]
    routers: list[RouterLogits]


def forward_layer(
    skeleton: Skeleton,
    layer: int,
    weights: UnitWeights | None,
    call: Call,
    hidden: torch.Tensor,
    *,
    grad: bool,
    recompute: bool = True,
) -> tuple[torch.Tensor, LayerGraph | None]:
    """The layer's output, and with `grad` the graph that its backward needs.

    recompute: False keeps what the graph saves, weights included: for a layer whose backward
    comes before anything else is put into its slot. Autograd's version counters would object.
    With a router loss, the router logits are left in `call` as well.
    """
    with torch.set_grad_enabled(grad), skeleton.bound(layer + 1, weights, grad=grad) as leaves:
        start = hidden.detach().requires_grad_(grad)
        with capture_routers(skeleton, layer) as routers:
            if grad and recompute:
                output = checkpoint(
                    partial(run_layer, skeleton, layer, call),
                    start,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                output = run_layer(skeleton, layer, call, start)
    call.routers.append([r._replace(logits=r.logits.detach()) for r in routers])
    return output.detach(), LayerGraph(output, start, leaves, routers) if grad else None


def backward_layer(
    skeleton: Skeleton,
    layer: int,
    weights: UnitWeights | None,
    call: Call,
    graph: LayerGraph,
    output_gradient: torch.Tensor,
    gradient: UnitGradient | None,
) -> torch.Tensor:
    """Recompute what the graph needs, run it backward, and return the gradient of the layer's input."""
    roots = [graph.output, *(r.logits for r in graph.routers)]
    gradients = (
        [output_gradient, *(r.logits for r in call.routers[layer])] if graph.routers else [output_gradient]
    )
    with (
        skeleton.bound(layer + 1, weights, grad=True),
        collecting(skeleton, layer + 1, graph.leaves, gradient),
    ):
        torch.autograd.backward(roots, gradients)
    return _gradient_of(graph.hidden)


def loss_and_backward(
    skeleton: Skeleton,
    weights: UnitWeights | None,
    call: Call,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    gradient: UnitGradient | None,
    *,
    num_tokens: int,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss share of this micro-batch, gradient of the last layer's output [batch, tokens, width]).

    targets: [batch, tokens] on the host. num_tokens: targets of the whole step. The router's
    auxiliary loss counts with the micro-batch's share of those.
    """
    with torch.enable_grad(), bound_for_backward(skeleton, skeleton.head, weights, gradient):
        flat, wanted = hidden.flatten(0, 1), targets.flatten()
        total, hidden_gradient = head_loss(skeleton, flat, wanted, num_tokens, chunk)
        if skeleton.has_router_loss:
            share = int((wanted != -100).sum()) / num_tokens
            leaves = [
                [r._replace(logits=r.logits.detach().requires_grad_()) for r in layer]
                for layer in call.routers
            ]
            loss = run_router_loss(skeleton, call, leaves, hidden) * share
            loss.backward()
            call.routers = [[r._replace(logits=_gradient_of(r.logits)) for r in layer] for layer in leaves]
            total += loss.detach()
    return total, hidden_gradient.view_as(hidden)


def backward_prologue(
    skeleton: Skeleton,
    weights: UnitWeights | None,
    embeds: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    output_gradient: torch.Tensor,
    gradient: UnitGradient | None,
) -> torch.Tensor:
    """The gradient of the embedding rows [batch, tokens, width], the prologue run again with a graph."""
    embeds = embeds.detach().requires_grad_()
    with torch.enable_grad(), bound_for_backward(skeleton, 0, weights, gradient):
        first, _ = run_prologue(skeleton, embeds, inputs)
        if first is None:
            return (
                output_gradient.clone()
            )  # a buffer of its own: the gradient that came in has another lifetime
        first.backward(output_gradient)
    return _gradient_of(embeds)


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def host_embedding(skeleton: Skeleton) -> nn.Embedding:
    """The model's embedding module once more, for look-ups on the host: its buffers (a scale, for
    example) stay in host memory, and what is bound to one of the two modules the other does not see.

    The compute lane replaces the forward of the model's own module while the host lane looks up the
    rows of the next micro-batch; with one module for both, the two would race.
    """
    twin = copy.copy(skeleton.embedding)
    twin._parameters = dict(skeleton.embedding._parameters)
    twin._buffers = {n: None if b is None else b.cpu() for n, b in skeleton.embedding._buffers.items()}
    return twin


def gather_rows(embedding: nn.Embedding, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [batch, tokens, width] of ids [batch, tokens], by the (host) module's own forward."""
    with torch.no_grad(), _embedding_weight(embedding, table):
        return embedding(ids)


def row_gradients(
    embedding: nn.Embedding,
    table: torch.Tensor,
    ids: list[torch.Tensor],
    gradients: list[torch.Tensor],
    *,
    padding_row: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the table rows that were used, summed over micro-batches.

    ids: [batch, tokens] each; gradients: of the module's output, [batch, tokens, width] each;
    padding_row: the row that gets none.
    Returns (row numbers [r], rows [r, width]): of the table's dtype for one micro-batch, else fp32.
    """
    rows = torch.unique(torch.cat([i.reshape(-1) for i in ids]))
    total: torch.Tensor | None = None
    for batch_ids, gradient in zip(ids, gradients, strict=True):
        leaf = table[rows].requires_grad_()
        with torch.enable_grad(), _embedding_weight(embedding, leaf):
            embedding(torch.searchsorted(rows, batch_ids)).backward(gradient)
        if total is None:
            total = _gradient_of(leaf) if len(ids) == 1 else _gradient_of(leaf).float()
        else:
            total += _gradient_of(leaf)
    assert total is not None
    if padding_row is not None:
        total[rows == padding_row] = 0
    return rows, total


@contextmanager
def _embedding_weight(embedding: nn.Embedding, weight: torch.Tensor) -> Iterator[None]:
    parameters = embedding._parameters
    old = parameters["weight"]
    parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        parameters["weight"] = old


@contextmanager
def random_state(
    skeleton: Skeleton, device: torch.device, base: int, unit: int, micro_batch: int
) -> Iterator[None]:
    """Random numbers that depend on (seed and step, unit, micro-batch) alone, so that a recompute
    draws the same dropout masks whatever ran in between. The caller's generators are left as they
    were. Does nothing for a model without dropout or other noise."""
    if not skeleton.has_noise:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(hash((base, unit, micro_batch)) & 0x7FFF_FFFF_FFFF_FFFF)
        yield
