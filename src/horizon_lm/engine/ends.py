"""What surrounds the layers: prologue, router loss and embedding rows of one micro-batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from horizon_lm.engine.gradient import UnitGradient, collecting
from horizon_lm.engine.loss import Draws
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.capture import Call, run_prologue, run_router_loss
from horizon_lm.model.skeleton import Skeleton


@contextmanager
def bound_for_backward(
    skeleton: Skeleton, unit: int, weights: UnitWeights | None, gradient: UnitGradient | None
) -> Iterator[None]:
    """While open, bind the unit's weights as leaves and collect their gradients."""
    with skeleton.bound(unit, weights, grad=True) as leaves, collecting(skeleton, unit, leaves, gradient):
        yield


def forward_prologue(
    skeleton: Skeleton, weights: UnitWeights | None, embeds: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Call]:
    """Return layer 0's input [batch, tokens, width] and the layers' other arguments."""
    with torch.no_grad(), skeleton.bound(0, weights, grad=False):
        first, call = run_prologue(skeleton, embeds, inputs)
    # A separate buffer even when the prologue changes nothing: `embeds` has another lifetime.
    return embeds.clone() if first is None else first, call


def router_loss_and_backward(
    skeleton: Skeleton, call: Call, hidden: torch.Tensor, share: float, draws: Draws
) -> torch.Tensor:
    """The routers' auxiliary loss times `share`; leaves the gradients of router logits in `call`.

    hidden: the last layer's output [batch, tokens, width]. The head must be bound.
    """
    leaves = [
        [r._replace(logits=r.logits.detach().requires_grad_()) for r in layer] for layer in call.routers
    ]
    with draws():  # dropouts on the way to it have no effect, but draw
        loss = run_router_loss(skeleton, call, leaves, hidden) * share
    loss.backward()
    call.routers = [[r._replace(logits=_gradient_of(r.logits)) for r in layer] for layer in leaves]
    return loss.detach()


def backward_prologue(
    skeleton: Skeleton,
    weights: UnitWeights | None,
    embeds: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    output_gradient: torch.Tensor,
    gradient: UnitGradient | None,
) -> torch.Tensor:
    """Rerun the prologue with a graph; return the gradient of the embedding rows [batch, tokens, width]."""
    embeds = embeds.detach().requires_grad_()
    with torch.enable_grad(), bound_for_backward(skeleton, 0, weights, gradient):
        first, _ = run_prologue(skeleton, embeds, inputs)
        if first is None:
            return output_gradient.clone()  # the incoming gradient has another lifetime
        first.backward(output_gradient)
    return _gradient_of(embeds)


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def host_embedding(skeleton: Skeleton) -> nn.Embedding:
    """A copy of the model's embedding module for look-ups on the host, with buffers in host memory.

    The compute lane replaces the forward of the model's own module while the host lane looks up the next
    micro-batch; sharing one module would be a race.
    """
    twin = copy.copy(skeleton.embedding)
    twin._parameters = dict(skeleton.embedding._parameters)
    twin._buffers = {n: None if b is None else b.cpu() for n, b in skeleton.embedding._buffers.items()}
    return twin


def gather_rows(embedding: nn.Embedding, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Look up ids [batch, tokens] by the (host) module's own forward; returns [batch, tokens, width]."""
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
    """Sum the gradients of the used table rows over micro-batches.

    ids: [batch, tokens] each. gradients: of the module's output, [batch, tokens, width] each. padding_row:
    the row that gets none. Returns (row numbers [r], rows [r, width]), the rows in the table's dtype for one
    micro-batch, else fp32.
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
