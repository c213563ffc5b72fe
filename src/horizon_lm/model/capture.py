"""Run the parts of a model through its own forward: prologue, one layer, head, router loss.

The prologue is the model's forward with its decoder layers replaced by recorders. What each layer
would have received (masks, rotary embeddings, position ids, differences from layer to layer) is
thereby exactly what transformers computes. The head is the same forward on one dummy token, with
the last layer replaced by the true hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .anatomy import accepted, intercept, split_hidden
from .skeleton import Router, Skeleton


@dataclass
class Call:
    """What the layers receive beside hidden states for one micro-batch, and their router logits.

    layers: per layer (positional, named) arguments without hidden states.
    inputs: what the model's forward was given (attention_mask, position_ids).
    routers: per layer its router logits [tokens, experts], when the auxiliary loss is asked for;
    once the loss is known, their gradients.
    """

    layers: list[tuple[tuple, dict[str, Any]]]
    inputs: dict[str, torch.Tensor]
    routers: list[list[torch.Tensor]] = field(default_factory=list)


class _Enough(Exception):
    """Raised by the last recorder: what follows is the head's work."""


def run_prologue(
    skeleton: Skeleton, embeds: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Call]:
    """Run what comes before layer 0. embeds: [batch, tokens, hidden]; returns layer 0's input
    [batch, tokens, hidden] and the captured call. Its parameters must be bound."""
    recorded: list[tuple[tuple, dict[str, Any]]] = []
    first: list[torch.Tensor] = []
    last = skeleton.num_layers - 1

    def record(i: int, *args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = split_hidden(args, kwargs)
        if i == 0:
            first.append(hidden)
        recorded.append((rest, named))
        if i == last:
            raise _Enough
        return (hidden,) if skeleton.anatomy.returns_tuple else hidden

    model = skeleton.model
    given = accepted(model, inputs_embeds=embeds, use_cache=False, output_router_logits=False, **inputs)
    missing = inputs.keys() - given.keys()
    if missing:
        raise UnsupportedModelError(
            f"{skeleton.model_type} does not take {', '.join(sorted(missing))}",
            hint="leave it out of the micro-batches",
        )
    with intercept(skeleton.layers, record):
        try:
            model(**given)
        except _Enough:
            pass
    return first[0], Call(recorded, inputs)


def run_layer(skeleton: Skeleton, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """Run decoder layer `layer` (0-based) on hidden [batch, tokens, hidden]; its parameters must be bound.

    Raises UnsupportedModelError when the layer passes on anything but hidden states.
    """
    rest, named = call.layers[layer]
    shared = [value for value in (*rest, *named.values()) if isinstance(value, (dict, list))]
    before = [len(value) for value in shared]
    output = skeleton.layers[layer](hidden, *rest, **named)
    extra: list[Any] = []
    if isinstance(output, tuple):
        output, *extra = output
    if [len(value) for value in shared] != before or any(isinstance(e, torch.Tensor) for e in extra):
        raise UnsupportedModelError(
            f"{skeleton.model_type} cannot be streamed layer by layer: layer {layer} passes on more than hidden states",
            hint="docs/architectures.md lists the models that can be streamed",
        )
    return output


def run_head(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] of hidden [n, hidden], with whatever norm, scaling or soft-capping
    the model's own forward applies; the head's parameters must be bound."""
    rows = hidden.unsqueeze(0)

    def skip(i: int, *args: Any, **kwargs: Any) -> Any:
        value = rows if i == skeleton.num_layers - 1 else split_hidden(args, kwargs)[0]
        return (value,) if skeleton.anatomy.returns_tuple else value

    logits = _run_after_layers(skeleton, skip, hidden, 1, 1, {"output_router_logits": False}).logits
    return logits.reshape(hidden.shape[0], logits.shape[-1])


def _run_after_layers(
    skeleton: Skeleton, layer: Callable[..., Any], like: torch.Tensor, batch: int, tokens: int, options: dict[str, Any]
) -> Any:
    """The model's forward on dummy embeddings [batch, tokens, hidden], its layers replaced by `layer`."""
    width = skeleton.embedding.embedding_dim
    dummy = torch.zeros(1, dtype=skeleton.dtype, device=like.device).expand(batch, tokens, width)
    given = accepted(skeleton.model, inputs_embeds=dummy, use_cache=False, **options)
    with _dummy_prologue(skeleton, like.device), intercept(skeleton.layers, layer):
        return skeleton.model(**given)


class _dummy_prologue:
    """Bind the prologue's parameters to zeros that take no memory (stride 0): its output is discarded."""

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self.run = None
        unit = skeleton.units[0]
        if unit.numel:
            self.run = torch.zeros(1, dtype=skeleton.dtype, device=device).expand(unit.numel)
        self.bound = skeleton.bound(0, self.run, grad=False)

    def __enter__(self) -> None:
        self.bound.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.bound.__exit__(*exc)


def capture_routers(skeleton: Skeleton, layer: int) -> _RouterCapture:
    """A context in which the router logits of decoder layer `layer` are collected as a list."""
    return _RouterCapture(skeleton.routers[layer])


class _RouterCapture:
    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers
        self.logits: list[torch.Tensor] = []

    def __enter__(self) -> list[torch.Tensor]:
        self.handles = [
            module.register_forward_hook(lambda _m, _a, output, index=index: self._keep(output, index))
            for module, index in self.routers
        ]
        return self.logits

    def _keep(self, output: Any, index: int) -> None:
        self.logits.append(output[index] if isinstance(output, tuple) else output)

    def __exit__(self, *exc: Any) -> None:
        for handle in self.handles:
            handle.remove()


def run_router_loss(
    skeleton: Skeleton, call: Call, routers: list[list[torch.Tensor]], hidden: torch.Tensor
) -> torch.Tensor:
    """The router's auxiliary loss times its coefficient, as the model's own forward computes it.

    routers: per layer its router logits [tokens, experts]; hidden: [batch, tokens, hidden], the
    last layer's output. Router modules are called with their forward replaced, so that
    transformers' own output recorders see the given logits. The head must be bound.
    """

    def replay(i: int, *args: Any, **kwargs: Any) -> Any:
        for (module, index), logits in zip(skeleton.routers[i], routers[i], strict=True):
            output = tuple(logits if k == index else None for k in range(index + 1))
            module.forward = lambda *a, output=output: output
            try:
                module()
            finally:
                module.__dict__.pop("forward")
        value = hidden if i == skeleton.num_layers - 1 else split_hidden(args, kwargs)[0]
        return (value,) if skeleton.anatomy.returns_tuple else value

    batch, tokens, _ = hidden.shape
    options = {"output_router_logits": True, "logits_to_keep": 1, **call.inputs}
    output = _run_after_layers(skeleton, replay, hidden, batch, tokens, options)
    model = skeleton.model
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = skeleton.config.router_aux_loss_coef
    return coefficient * output.aux_loss
