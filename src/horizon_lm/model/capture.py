"""Run parts of a model through its own forward: one layer, head, router loss; `prologue` runs the rest.

The head is run by its own modules (`OwnHead`). If they cannot be isolated, it is the same forward on one
dummy token, with the last layer replaced by the true hidden states.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import UnsupportedModelError
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.anatomy import (
    accepted,
    as_layer_output,
    embedding_gives,
    intercept,
    split_hidden,
)
from horizon_lm.model.attention import attention_by_intervals
from horizon_lm.model.features import Added
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.picture_batches import pictures_of


class RouterLogits(NamedTuple):
    """A router, the index of its logits in its output, and the logits [tokens, experts]."""

    module: nn.Module
    place: int
    logits: torch.Tensor


@dataclass
class Call:
    """The layers' arguments other than hidden states for one micro-batch, and their router logits.

    layers: per layer, (positional, named) arguments without hidden states.
    inputs: arguments of the model's forward (input_ids, attention_mask, position_ids), without pictures.
    added: what the model adds to the output of a layer (0-based).
    routers: per layer, its routers' logits if the auxiliary loss is on; replaced by their gradients once the
    loss is computed. is_untouched: layer 0 receives the embeddings unchanged.
    """

    layers: list[tuple[tuple, dict[str, Any]]]
    inputs: dict[str, torch.Tensor]
    routers: list[list[RouterLogits]] = field(default_factory=list)
    is_untouched: bool = False
    added: Mapping[int, Added] = field(default_factory=dict)


def run_layer(skeleton: Skeleton, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """Run decoder layer `layer` (0-based) on hidden [batch, tokens, hidden]; its parameters must be bound.

    Raises UnsupportedModelError if the layer passes on anything but hidden states.
    """
    rest, named = call.layers[layer]
    rest, named = tuple(map(_emptied, rest)), {name: _emptied(value) for name, value in named.items()}
    shared = [value for value in (*rest, *named.values()) if isinstance(value, (dict, list))]
    before = [len(value) for value in shared]
    version = hidden._version
    try:
        with attention_by_intervals():
            output = skeleton.run(layer, hidden, *rest, **named)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" in str(error):
            raise refuse(
                skeleton, f"layer {layer} uses weights that belong to another part of the model"
            ) from error
        raise
    except KeyError as error:
        if any(isinstance(value, UserDict) for value in (*rest, *named.values())):
            raise refuse(skeleton, f"layer {layer} reads {error} of an earlier layer") from error
        raise
    if hidden._version != version:
        raise refuse(skeleton, f"layer {layer} writes into its input")
    outputs = skeleton.anatomy.layer_outputs
    if isinstance(output, (tuple, list)) != bool(outputs) or (outputs and len(output) > outputs):
        raise refuse(skeleton, f"layer {layer} passes on more than hidden states")
    if [len(value) for value in shared] != before:
        raise refuse(skeleton, f"layer {layer} leaves something behind for later layers")
    output = output[0] if outputs else output
    return call.added[layer].to(output) if layer in call.added else output


def _emptied(value: Any) -> Any:
    """Copy a dictionary that layers use to pass keys and values to later layers (gemma4), so that no layer
    sees another's tensors: they would belong to a graph that has run, or will run again."""
    return copy.copy(value) if isinstance(value, UserDict) else value


def refuse(skeleton: Skeleton, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{skeleton.model_type} cannot be streamed layer by layer: {reason}",
        hint="docs/architectures.md lists the models that can be streamed",
    )


def run_head(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """Compute logits [n, vocabulary] of hidden [n, hidden], with the norm, scaling and soft-capping of the
    model's own forward; the head's parameters must be bound."""
    rows = hidden.unsqueeze(0)
    if skeleton.own_head is not None:
        logits = skeleton.own_head.logits(rows)
        return logits.reshape(hidden.shape[0], logits.shape[-1])
    tokens = 1 if skeleton.anatomy.head_takes_one_token else hidden.shape[0]

    def skip(i: int, *args: Any, **kwargs: Any) -> Any:
        value = rows if i == skeleton.num_layers - 1 else split_hidden(args, kwargs)[0]
        return as_layer_output(value, skeleton.anatomy.layer_outputs)

    logits = _run_after_layers(skeleton, skip, hidden, 1, tokens, {"output_router_logits": False}).logits
    return logits.reshape(hidden.shape[0], logits.shape[-1])


def _run_after_layers(
    skeleton: Skeleton,
    layer: Callable[..., Any],
    like: torch.Tensor,
    batch: int,
    tokens: int,
    options: dict[str, Any],
) -> Any:
    """Run the model's forward on dummy embeddings [batch, tokens, hidden], with its layers replaced by
    `layer`."""
    width = skeleton.embedding.embedding_dim
    dummy = torch.zeros(batch, tokens, width, dtype=skeleton.dtype, device=like.device)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=like.device)
    given = accepted(skeleton.model, use_cache=False, **{"input_ids": ids} | options)
    with (
        _dummy_prologue(skeleton, like.device),
        embedding_gives(skeleton.embedding, dummy),
        intercept(skeleton.layers, layer),
    ):
        return skeleton.model(**given)


class _dummy_prologue:
    """Binds the prologue's parameters to zeros without memory (stride 0): its output is discarded."""

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        unit = skeleton.units[0]
        zeros = torch.zeros(1, dtype=skeleton.dtype, device=device).expand(unit.numel)
        residual = torch.zeros(unit.wide_numel, dtype=torch.int16, device=device)
        self.bound = skeleton.bound(0, UnitWeights(zeros, residual), grad=False)

    def __enter__(self) -> None:
        self.bound.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.bound.__exit__(*exc)


@contextmanager
def capture_routers(skeleton: Skeleton, layer: int) -> Iterator[list[RouterLogits]]:
    """While open, collect the router logits of decoder layer `layer` (0-based) in the yielded list, in the
    order in which the routers ran."""
    seen: list[RouterLogits] = []

    def keep(module: nn.Module, args: Any, output: Any, *, index: int) -> None:
        logits = output[index] if isinstance(output, (tuple, list)) else output
        seen.append(RouterLogits(module, index, logits))

    handles = [
        module.register_forward_hook(partial(keep, index=index)) for module, index in skeleton.routers[layer]
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def drop_captures(skeleton: Skeleton) -> None:
    """Remove hooks that an interrupted `capture_routers` left behind."""
    for module in {module for routers in skeleton.routers for module, _ in routers}:
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, partial) and hook.func.__qualname__.startswith(capture_routers.__name__):
                del module._forward_hooks[key]


def run_router_loss(
    skeleton: Skeleton, call: Call, routers: list[list[RouterLogits]], hidden: torch.Tensor
) -> torch.Tensor:
    """Compute the routers' auxiliary loss times its coefficient, as the model's own forward does.

    routers: per layer, its routers' logits. hidden: the last layer's output [batch, tokens, hidden]. Router
    modules run with their forward replaced, so that transformers' output recorders see these logits. The head
    must be bound.
    """

    def replay(i: int, *args: Any, **kwargs: Any) -> Any:
        for module, place, logits in routers[i]:
            output = tuple(logits if k == place else None for k in range(place + 1))
            module.forward = lambda *a, output=output: output
            try:
                module()
            finally:
                module.__dict__.pop("forward")
        value = hidden if i == skeleton.num_layers - 1 else split_hidden(args, kwargs)[0]
        return as_layer_output(value, skeleton.anatomy.layer_outputs)

    batch, tokens = hidden.shape[:2]
    # All labels ignored and summed: only the auxiliary part of the model's loss remains.
    nothing = torch.full((batch, 1), IGNORED, device=hidden.device)
    options = {"output_router_logits": True, "logits_to_keep": 1, "labels": nothing, "num_items_in_batch": 1}
    _, inputs = pictures_of(call.inputs)  # as an op copied them again
    return _run_after_layers(skeleton, replay, hidden, batch, tokens, options | inputs).loss
