"""Prologue, head and embedding rows of one micro-batch; layers are in `activations`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from horizon_lm.engine.gradient import UnitGradient, collecting
from horizon_lm.engine.loss import IGNORE_INDEX, HeadLoss
from horizon_lm.engine.noise import Draws
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.capture import Call, run_prologue, run_router_loss
from horizon_lm.model.skeleton import Skeleton


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


def loss_and_backward(
    skeleton: Skeleton,
    weights: UnitWeights | None,
    call: Call,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    gradient: UnitGradient | None,
    head_loss: HeadLoss,
    draws: Draws,
    *,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss share of this micro-batch, gradient of the last layer's output [batch, tokens, width]).

    targets: [batch, tokens] on the host. num_tokens: targets of the whole step. The router's
    auxiliary loss counts with the micro-batch's share of those.
    """
    with torch.enable_grad(), bound_for_backward(skeleton, skeleton.head, weights, gradient):
        total, hidden_gradient = head_loss(skeleton, hidden, targets, draws)
        if skeleton.has_router_loss:
            share = int((targets != IGNORE_INDEX).sum()) / num_tokens
            leaves = [
                [r._replace(logits=r.logits.detach().requires_grad_()) for r in layer]
                for layer in call.routers
            ]
            with draws():  # dropouts on the way to it have no effect, but draw
                loss = run_router_loss(skeleton, call, leaves, hidden) * share
            loss.backward()
            call.routers = [[r._replace(logits=_gradient_of(r.logits)) for r in layer] for layer in leaves]
            total += loss.detach()
    return total, hidden_gradient


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
