"""Run what comes before a model's first layer, and record what each layer receives.

It is the model's own forward with its decoder layers replaced by recorders, so masks, rotary embeddings,
positions and the places of pictures are exactly what transformers computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from horizon_lm.errors import UnsupportedModelError
from horizon_lm.model.anatomy import (
    accepted,
    as_layer_output,
    embedding_gives,
    intercept,
    split_hidden,
    tensors_in,
)
from horizon_lm.model.attention import attention_by_intervals
from horizon_lm.model.capture import Call, refuse
from horizon_lm.model.features import Added, features_given
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.picture_batches import pictures_of


class _Enough(Exception):
    """Raised by the last recorder to skip the head."""


def run_prologue(
    skeleton: Skeleton,
    embeds: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    added: Mapping[int, Added] | None = None,
) -> tuple[torch.Tensor | None, Call]:
    """Run what comes before layer 0; its parameters must be bound.

    embeds: [batch, tokens, hidden]. inputs: input_ids, optionally attention_mask, position_ids and pictures.
    added: what an earlier run found to be added between layers. Returns layer 0's input [batch, tokens,
    hidden] (None if that is `embeds` itself) and the captured call.
    Raises UnsupportedModelError if a layer, or what follows the last one, would receive anything but the
    output of the layer before, or that and something added to it.
    """
    work = _with_neftune_noise(skeleton, embeds.clone())  # a copy: some models scale it in place
    recorder = _Recorder(skeleton)
    _record(skeleton, work, inputs, recorder)
    first = recorder.finish()
    if added is None and recorder.changed:
        added = _find_added(skeleton, embeds, inputs, recorder)
    untouched = first is work and work._version == 0 and skeleton.neftune_noise_alpha is None
    _, others = pictures_of(inputs)  # pictures are copied again where they are needed again
    return None if untouched else first, Call(recorder.calls, others, added=added or {})


def _record(
    skeleton: Skeleton, embeds: torch.Tensor, inputs: dict[str, torch.Tensor], recorder: _Recorder
) -> None:
    """Run the model's forward on these embeddings with its layers replaced by the recorder."""
    model = skeleton.model
    pictures, plain = pictures_of(inputs)
    given = accepted(model, use_cache=False, output_router_logits=False, **plain)
    # A forward that swallows any keyword would silently ignore position_ids.
    missing = plain.keys() - inspect.signature(model.forward).parameters.keys()
    if missing:
        raise UnsupportedModelError(
            f"{skeleton.model_type} does not take {', '.join(sorted(missing))}",
            hint="leave it out of the micro-batches",
        )
    if pictures is not None:
        given["pixel_values"] = pictures.features  # any tensor: the features are given
    if "position_ids" in given:
        given["position_ids"] = _positions(skeleton, given["position_ids"])
    try:
        with (
            attention_by_intervals(),
            embedding_gives(skeleton.embedding, embeds),
            features_given(skeleton, pictures, plain) as uses,
            intercept(skeleton.layers, recorder.layer),
            recorder.head_watched(),
            suppress(_Enough),
        ):
            model(**given)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" in str(error) and recorder.first is not None:
            raise refuse(skeleton, f"weights of the head are used after layer {recorder.last}") from error
        if "meta" in str(error) and pictures is not None:
            raise refuse(skeleton, "its forward computes features of pictures by other functions") from error
        raise
    if pictures is not None and len(uses) != 1:
        raise refuse(skeleton, f"its forward asks for the features of pictures {len(uses)} times")


def _positions(skeleton: Skeleton, positions: torch.Tensor) -> torch.Tensor:
    """Positions [batch, tokens] as the model takes them.

    Models with rotary embeddings of several axes (Qwen2.5-VL) find packed documents in a row of positions of
    their own before those of the axes, and else let documents see one another.
    """
    rope = getattr(skeleton.text_config, "rope_parameters", None)
    axes = rope.get("mrope_section") if isinstance(rope, dict) and skeleton.pictures is not None else None
    return positions.expand(1 + len(axes), -1, -1) if axes else positions


def _find_added(
    skeleton: Skeleton, embeds: torch.Tensor, inputs: dict[str, torch.Tensor], seen: _Recorder
) -> dict[int, Added]:
    """What the model's forward adds to the outputs of layers (Qwen3-VL adds features of pictures).

    Two more runs tell: after layers that return zeros, a layer receives what is added; after layers that
    return random numbers, it must receive the same bits as those numbers with that added. The first run
    requires gradients of all that is trained before the layers, which what is added must not depend on.
    """
    probe = partial(_Recorder, skeleton)
    zeros, noise = probe(give=torch.zeros_like), probe(give=torch.randn_like)
    with torch.enable_grad(), skeleton.requiring_grad(0):
        leaf = embeds.detach().requires_grad_(skeleton.embedding_trainable)
        _record(skeleton, _with_neftune_noise(skeleton, leaf.clone()), inputs, zeros)
    with torch.no_grad():
        _record(skeleton, _with_neftune_noise(skeleton, embeds.clone()), inputs, noise)
    found: dict[int, Added] = {}
    for layer in seen.changed:
        after = "the head" if layer == skeleton.num_layers - 1 else f"layer {layer + 1}"
        value, changed = zeros.changed.get(layer), noise.changed.get(layer)
        if value is None or changed is None or value.requires_grad:
            raise refuse(skeleton, f"{after} receives something else than the output of layer {layer}")
        with torch.no_grad():
            found[layer] = Added.of(value)
            if not torch.equal(found[layer].to(noise.given[layer]), changed):
                raise refuse(
                    skeleton,
                    f"{after} receives something else than the output of layer {layer}, and it is not that "
                    "output with something added",
                )
    return found


def _with_neftune_noise(skeleton: Skeleton, embeds: torch.Tensor) -> torch.Tensor:
    """Apply transformers' NEFTune hook to the embeddings: noise in training only."""
    if skeleton.neftune_noise_alpha is None:
        return embeds
    from transformers.integrations.neftune import neftune_post_forward_hook

    stand_in = SimpleNamespace(
        training=skeleton.embedding.training, neftune_noise_alpha=skeleton.neftune_noise_alpha
    )
    return neftune_post_forward_hook(stand_in, None, embeds)


class _Recorder:
    """Replaces the layers while the prologue runs. Records the arguments of each, and notes if its hidden
    states are not the output of the layer before: the same tensor, unmodified.

    give: makes a layer's output like layer 0's input; without it each returns that input. given: the outputs.
    changed: layers whose successor (or the head) receives another tensor, and that tensor.
    """

    def __init__(
        self, skeleton: Skeleton, give: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.skeleton, self._give = skeleton, give
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.first: torch.Tensor | None = None
        self.given: list[torch.Tensor] = []
        self.changed: dict[int, torch.Tensor] = {}
        self._version = 0
        self._done = False
        self._besides: dict[int, tuple[int, torch.Tensor, int]] = {}  # layer, tensor, version by identity

    @property
    def last(self) -> int:
        """The last layer called."""
        return len(self.calls) - 1

    def layer(self, i: int, *args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = split_hidden(args, kwargs)
        if i != len(self.calls):
            raise refuse(self.skeleton, f"layer {i} runs after layer {self.last}")
        if self.first is None:
            self.first = hidden
        else:
            self._check(hidden, f"layer {i}")
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in tensors_in([rest, named]):
                if tensor.requires_grad:
                    shape = tuple(tensor.shape)
                    raise refuse(self.skeleton, f"layer {i} receives a second activation of shape {shape}")
                self._besides.setdefault(id(tensor), (i, tensor, tensor._version))
        self.calls.append((rest, named))
        if self._complete and not self.skeleton.anatomy.head_entry:
            self._done = True
            raise _Enough
        output = self.first if self._give is None else self._give(self.first.detach())
        if self._give is not None:
            self.given.append(output)
        self._passed, self._version = output, output._version
        return as_layer_output(output, self.skeleton.anatomy.layer_outputs)

    @property
    def _complete(self) -> bool:
        return len(self.calls) == self.skeleton.num_layers

    def _check(self, hidden: Any, who: str) -> None:
        """Note whether `who` receives what the stand-in for the last layer returned."""
        if self._passed._version != self._version:
            raise refuse(
                self.skeleton, f"the output of layer {self.last} is written into before {who} receives it"
            )
        if hidden is self._passed:
            return
        if getattr(hidden, "shape", None) != self._passed.shape or hidden.dtype != self._passed.dtype:
            raise refuse(self.skeleton, f"{who} receives something else than the output of layer {self.last}")
        self.changed[self.last] = hidden

    @contextmanager
    def head_watched(self) -> Iterator[None]:
        """While open, stop the run where the head begins, and check that it receives the last layer's
        output."""
        path = self.skeleton.anatomy.head_entry
        if not path:
            yield
            return
        module = self.skeleton.model.get_submodule(path)
        own = module.__dict__.get("forward")

        def begin(*args: Any, **kwargs: Any) -> Any:
            if not self._complete:  # also used before the layers
                return (own or partial(type(module).forward, module))(*args, **kwargs)
            given = list(tensors_in([args, kwargs]))
            same = next((t for t in given if t is self._passed), given[0] if given else None)
            self._check(same, "the head")
            self._done = True
            raise _Enough

        module.forward = begin  # type: ignore[method-assign]
        try:
            yield
        finally:
            module.__dict__.pop("forward")
            if own is not None:
                module.forward = own

    def finish(self) -> torch.Tensor:
        """Return layer 0's input. Raises UnsupportedModelError unless all layers, then the head, were
        called."""
        if not self._complete:
            raise refuse(self.skeleton, f"{len(self.calls)} of its {self.skeleton.num_layers} layers are run")
        if not self._done:
            raise refuse(self.skeleton, "its head does not receive the output of the last layer")
        with torch._C.DisableTorchFunctionSubclass():
            for layer, tensor, version in self._besides.values():
                if tensor._version != version:
                    raise refuse(
                        self.skeleton,
                        f"what layer {layer} receives besides hidden states is written into later",
                    )
        assert self.first is not None
        return self.first
