"""The parts around the layers: embedding rows, prologue and router loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from horizon_lm.engine.gradient import UnitGradient, collecting
from horizon_lm.engine.head_gradient import projection_into
from horizon_lm.engine.loss import Draws
from horizon_lm.memory.pinned import PinnedPool
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.capture import Call, run_router_loss
from horizon_lm.model.prologue import run_prologue
from horizon_lm.model.skeleton import Skeleton


@contextmanager
def bound_for_backward(
    skeleton: Skeleton, unit: int, weights: UnitWeights | None, gradient: UnitGradient | None
) -> Iterator[None]:
    """While open, bind the unit's weights as leaves and collect their gradients."""
    with (
        skeleton.bound(unit, weights, grad=True) as leaves,
        collecting(skeleton, unit, leaves, gradient),
        projection_into(skeleton, unit, gradient),
    ):
        yield


def forward_prologue(
    skeleton: Skeleton, weights: UnitWeights | None, embeds: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Call]:
    """Return layer 0's input [batch, tokens, width] (it may be `embeds`) and the layers' other arguments."""
    with torch.no_grad(), skeleton.bound(0, weights, grad=False):
        first, call = run_prologue(skeleton, embeds, inputs)
    call.is_untouched = first is None
    return embeds if first is None else first, call


def router_loss_and_backward(
    skeleton: Skeleton, call: Call, hidden: torch.Tensor, weight: float, draws: Draws
) -> torch.Tensor:
    """The routers' auxiliary loss times its coefficient; leaves in `call` the gradients of router logits, of
    `weight` times that loss.

    hidden: the last layer's output [batch, tokens, width]. The head must be bound.
    """
    leaves = [
        [r._replace(logits=r.logits.detach().requires_grad_()) for r in layer] for layer in call.routers
    ]
    with draws():  # dropouts on the way to it have no effect, but draw
        loss = run_router_loss(skeleton, call, leaves, hidden)
    (loss * weight).backward()
    call.routers = [[r._replace(logits=_gradient_of(r.logits)) for r in layer] for layer in leaves]
    return loss.detach()


def backward_prologue(
    skeleton: Skeleton,
    weights: UnitWeights | None,
    embeds: torch.Tensor,
    call: Call,
    output_gradient: torch.Tensor,
    gradient: UnitGradient | None,
) -> None:
    """Run the prologue backward, into the graph of `embeds` [batch, tokens, width]. It is first rerun with a
    graph, unless it passed `embeds` on unchanged."""
    with torch.enable_grad(), bound_for_backward(skeleton, 0, weights, gradient):
        first = None if call.is_untouched else run_prologue(skeleton, embeds, call.inputs, call.added)[0]
        first = embeds if first is None else first
        if first.requires_grad:
            first.backward(output_gradient)


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class Rows(NamedTuple):
    """The rows of the embedding table that a step uses, found on the host before it begins: finding them on
    the device would make its lanes wait for values.

    numbers: [r], ascending. places: per micro-batch of this rank, the index in `numbers` of each of its ids
    [batch, tokens]. padding: the index of the row without a gradient; None if it is not used.
    """

    numbers: torch.Tensor
    places: list[torch.Tensor]
    padding: int | None

    @classmethod
    def of(
        cls,
        ids: Sequence[torch.Tensor],
        skeleton: Skeleton,
        pool: PinnedPool,
        mine: Sequence[int] | None = None,
    ) -> Rows:
        """ids: [batch, tokens] of each micro-batch of all ranks, on the host. pool: for pinned copies, whose
        upload does not block. mine: micro-batches of this rank; None: all."""
        used = torch.zeros(skeleton.embedding.num_embeddings, dtype=torch.bool)
        for batch in ids:
            used[batch.reshape(-1)] = True
        numbers, place = used.nonzero().view(-1), used.cumsum(0) - 1
        places = [place[ids[g]] for g in (range(len(ids)) if mine is None else mine)]
        row = skeleton.padding_row
        padding = int(place[row]) if row is not None and used[row] else None
        most = min(used.numel(), sum(batch.numel() for batch in ids))
        return cls(pool.take(numbers, most), [pool.take(place) for place in places], padding)


def look_up(skeleton: Skeleton, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Look up ids [batch, tokens] in table [n, width] by the embedding module's own forward; returns [batch,
    tokens, width]."""
    with _embedding_weight(skeleton.embedding, table):
        return skeleton.embedding(ids)  # type: ignore[no-any-return]


@contextmanager
def _embedding_weight(embedding: nn.Embedding, weight: torch.Tensor) -> Iterator[None]:
    parameters = embedding._parameters
    old = parameters["weight"]
    parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        parameters["weight"] = old
