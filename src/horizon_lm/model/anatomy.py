"""Analyse how to cut a transformers model: decoder layers, and what runs before and after them.

No model family is special-cased. The model's forward runs once on three tokens with its decoder layers
replaced by markers; the autograd graph then tells which parameters prologue and head use, and whether
anything but hidden states passes between layers. Unsupported models are rejected by name, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from horizon_lm.errors import UnsupportedModelError
from horizon_lm.model.pictures import PictureParts


@dataclass(frozen=True)
class Anatomy:
    """The cut. Names are Hugging Face parameter names, one per tied parameter.

    layers_path: module path of the decoder layers.
    layer_outputs: 0 if a layer returns hidden states; n if it returns a tuple of up to n, of which the model
    uses only the first, the hidden states.
    head_takes_one_token: the head runs on hidden states of any length, whatever its dummy input.
    head_entry: path of the first module after the layers, if it receives the last layer's output itself;
    empty if the forward computes something else first.
    prologue, head, idle: parameters used before the layers, after them, and by neither. vision: those that
    only pictures need; a projector that is trained is part of the prologue instead.
    embedding: name of the input embedding table. tied: the head uses it too.
    """

    layers_path: str
    layer_outputs: int
    head_takes_one_token: bool
    head_entry: str
    embedding: str
    tied: bool
    prologue: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    idle: tuple[str, ...]
    vision: tuple[str, ...] = ()


@contextmanager
def intercept(layers: nn.ModuleList | list[nn.Module], replacement: Callable[..., Any]) -> Iterator[None]:
    """While open, replace the forward of layer i by `replacement(i, *args, **kwargs)`.

    The module objects stay, so that the model still reads their attributes (kind of attention, layer index).
    """
    try:
        for i, layer in enumerate(layers):
            layer.forward = _Replaced(replacement, i)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def embedding_gives(embedding: nn.Module, embeds: torch.Tensor) -> Iterator[list[int]]:
    """While open, make the embedding module return `embeds` for any input. Yields a list with an entry per
    call.

    So the model runs with input_ids, as users run it, without the table: some models scale embeddings only
    if they looked them up themselves, or route tokens by their id.
    """
    calls: list[int] = []

    def give(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return embeds

    embedding.forward = give  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        embedding.__dict__.pop("forward", None)


class _Replaced:
    def __init__(self, function: Callable[..., Any], index: int) -> None:
        self.function, self.index = function, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.index, *args, **kwargs)


def split_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """Split the arguments of a layer into (hidden states, other args, other kwargs)."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def accepted(model: Any, **wanted: Any) -> dict[str, Any]:
    """Return the items of `wanted` that the model's forward accepts."""
    names = _accepted_names(type(model).forward)
    return wanted if names is None else {name: value for name, value in wanted.items() if name in names}


@lru_cache(maxsize=64)
def _accepted_names(forward: Callable) -> frozenset[str] | None:
    """Parameter names of a model's forward; None: any."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def analyse(
    model: Any,
    pictures: PictureParts | None = None,
    adapter_off: Callable[[], AbstractContextManager] | None = None,
) -> Anatomy:
    """Find where to cut `model` (parameters in memory, any device).

    pictures: the parts of a vision-language model, which is cut by its language model. adapter_off: switches
    the model's adapter off while it is open; what runs only then belongs to the same part of the model.
    Raises UnsupportedModelError, with model type and reason, if it cannot be streamed.
    """
    path, layers = _find_layers(model, "" if pictures is None else f"{pictures.language}.")
    names = _unique_names(model)
    embedding_module = model.get_input_embeddings()
    if not isinstance(embedding_module, nn.Embedding) or id(embedding_module.weight) not in names:
        raise _refuse(
            model, f"its input embedding is a {type(embedding_module).__name__}, not a table of rows"
        )
    if len(list(embedding_module.parameters())) != 1:
        raise _refuse(
            model, f"its input embedding ({type(embedding_module).__name__}) has parameters besides the table"
        )
    embedding = names[id(embedding_module.weight)]
    layer_names = _layer_parameters(model, path, layers, names)
    in_layers = {name for unit in layer_names for name in unit}
    outside = {id(p): p for p in model.parameters() if names[id(p)] not in in_layers}

    with _requiring_grad(list(outside.values())):
        outputs, first_hidden, logits, head_entry = _probe(model, layers, embedding_module)
        before, after = _leaves(first_hidden), _leaves(logits)
        if adapter_off is not None:
            with adapter_off():
                _, *ends, _ = _probe(model, layers, embedding_module)
            before, after = before | _leaves(ends[0]), after | _leaves(ends[1])
    used_before = {names[i] for i in before if i in outside}
    used_after = {names[i] for i in after if i in outside}
    if embedding in used_before or used_before & used_after:
        shared = sorted({embedding} & used_before | used_before & used_after)
        raise _refuse(model, f"{', '.join(shared)} is used both before and after the decoder layers")
    order = [names[i] for i in outside]
    unused = [n for n in order if n not in used_before | used_after | {embedding}]
    vision = [n for n in unused if pictures is not None and n in pictures.names]
    trained = _trained_projector(model, vision, pictures)
    return Anatomy(
        layers_path=path,
        layer_outputs=outputs,
        head_takes_one_token=_head_takes_one_token(
            model, layers, embedding_module, outputs, logits.shape[-1]
        ),
        head_entry=head_entry,
        embedding=embedding,
        tied=embedding in used_after,
        prologue=tuple(n for n in order if n in used_before or n in trained),
        layers=layer_names,
        head=tuple(n for n in order if n in used_after),
        idle=tuple(n for n in unused if n not in vision),
        vision=tuple(n for n in vision if n not in trained),
    )


def _trained_projector(model: Any, vision: list[str], pictures: PictureParts | None) -> set[str]:
    """Parameters of the projector if any of them is trained."""
    if pictures is None:
        return set()
    projector = {name for name in vision if pictures.is_projector(name)}
    return projector if any(p.requires_grad for n, p in model.named_parameters() if n in projector) else set()


def _refuse(model: Any, reason: str) -> UnsupportedModelError:
    kind = getattr(model.config, "model_type", type(model).__name__)
    return UnsupportedModelError(
        f"{kind} cannot be streamed layer by layer: {reason}",
        hint="docs/architectures.md lists the models that can be streamed, and why others cannot",
    )


def _find_layers(model: Any, below: str) -> tuple[str, nn.ModuleList]:
    """Find the outermost module list with the most parameters. below: beginning of its path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if (
            path.startswith(below)
            and isinstance(module, nn.ModuleList)
            and len(module)
            and not any(path.startswith(f"{p}.") for p in found)
        ):
            found[path] = module
    if not found:
        raise _refuse(model, "it has no list of decoder layers")
    best = max(found, key=lambda path: sum(p.numel() for p in found[path].parameters()))
    return best, found[best]


def _unique_names(model: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _layer_parameters(
    model: Any, path: str, layers: nn.ModuleList, names: dict[int, str]
) -> tuple[tuple[str, ...], ...]:
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(f"{path}.")
        place = ".".join(name.split(".")[: path.count(".") + 2]) if inside else ""
        if owner.setdefault(id(parameter), place) != place:
            raise _refuse(
                model, f"{name} is shared with {owner[id(parameter)] or 'a module outside the layers'}"
            )
    return tuple(tuple(dict.fromkeys(names[id(p)] for p in layer.parameters())) for layer in layers)


class _BrokenChain(Exception):
    pass


@contextmanager
def _requiring_grad(parameters: list[nn.Parameter]) -> Iterator[None]:
    required = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)


def as_layer_output(hidden: torch.Tensor, outputs: int, extra: Any = None) -> Any:
    """Return what a decoder layer does: `hidden`, or a tuple of `outputs` values that starts with it."""
    return (hidden, *[extra] * (outputs - 1)) if outputs else hidden


def _probe(
    model: Any, layers: nn.ModuleList, embedding: nn.Embedding
) -> tuple[int, torch.Tensor, torch.Tensor, str]:
    """Return (layer outputs, input of layer 0, logits, head entry), the tensors with their autograd
    graphs."""
    broken, failed = "", ""
    for outputs in (0, 3, 2, 1):
        try:
            return outputs, *_run_with_markers(model, layers, embedding, outputs)
        except _BrokenChain as error:
            broken = broken or str(error)
        except UnsupportedModelError:
            raise
        except Exception as error:  # anything may happen on the wrong kind of output
            failed = (
                failed or f"its forward failed when its layers were replaced: {type(error).__name__}: {error}"
            )
    raise _refuse(model, broken or failed)


def _run_with_markers(
    model: Any, layers: nn.ModuleList, embedding: nn.Embedding, outputs: int
) -> tuple[torch.Tensor, torch.Tensor, str]:
    seen: list[torch.Tensor] = []
    marker: list[torch.Tensor] = []

    def layer(i: int, *args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = split_hidden(args, kwargs)
        if i != len(marker) or (marker and (hidden is not marker[-1] or hidden._version)):
            raise _BrokenChain(
                f"something runs between decoder layers {i - 1} and {i}, or not all run in order"
            )
        if not marker:
            seen.append(hidden)
        for tensor in tensors_in([rest, named]):
            if tensor.requires_grad:
                raise _refuse(model, f"layer {i} receives a second activation of shape {tuple(tensor.shape)}")
        marker.append(hidden.detach().clone().requires_grad_())
        return as_layer_output(marker[-1], outputs, hidden.detach().clone().requires_grad_())

    ids = torch.zeros(2, 3, dtype=torch.long, device=embedding.weight.device)
    embeds = embedding(ids).detach().requires_grad_().clone()  # not a leaf: a model may scale it in place
    entry: list[str] = []

    def follows(path: str, args: tuple, kwargs: dict) -> None:
        if len(marker) == len(layers) and not entry:
            entry.append(path if any(t is marker[-1] for t in tensors_in([args, kwargs])) else "")

    with (
        torch.enable_grad(),
        embedding_gives(embedding, embeds) as calls,
        intercept(layers, layer),
        _watching(model, layers, follows),
    ):
        given = accepted(model, labels=ids, use_cache=False, output_router_logits=False)
        output = model(input_ids=ids, **given)
    if len(calls) != 1:
        raise _refuse(model, f"its forward looks up embeddings {len(calls)} times")
    if len(marker) != len(layers):
        raise _BrokenChain(f"{len(marker)} of its {len(layers)} decoder layers were called")
    logits = output.logits
    leaves = _leaves(logits)
    if tuple(logits.shape[:2]) != (2, 3) or id(marker[-1]) not in leaves:
        raise _BrokenChain("its logits do not follow from the output of the last layer")
    known = {id(marker[-1]), *map(id, model.parameters())}
    if not leaves <= known:
        raise _refuse(model, "its head uses more than the hidden states of the last layer")
    _check_loss(model, output, ids)
    return seen[0], logits, entry[0] if entry else ""


@contextmanager
def _watching(
    model: nn.Module, layers: nn.ModuleList, called: Callable[[str, tuple, dict], None]
) -> Iterator[None]:
    """While open, report each module call outside the layers to `called(path, args, kwargs)`."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: called(path, args, kwargs), with_kwargs=True
        )
        for path, module in model.named_modules()
        if path and id(module) not in inside
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_loss(model: Any, output: Any, labels: torch.Tensor) -> None:
    """Reject a model whose own loss is not just the mean next-token cross-entropy. Fake tensors (the
    planner's) cannot tell; training checks again."""
    if isinstance(output.logits, FakeTensor):
        return
    logits = output.logits.detach().float()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if output.loss is not None and not torch.allclose(
        output.loss.detach().float(), expected, rtol=1e-5, atol=1e-6
    ):
        raise _refuse(
            model,
            f"its forward computes a loss of its own ({output.loss.item():.6f}, "
            f"cross-entropy {expected.item():.6f})",
        )


def _head_takes_one_token(
    model: Any, layers: nn.ModuleList, embedding: nn.Embedding, outputs: int, vocabulary: int
) -> bool:
    def skip(i: int, *args: Any, **kwargs: Any) -> Any:
        hidden = split_hidden(args, kwargs)[0]
        return as_layer_output(hidden.expand(1, 3, hidden.shape[-1]), outputs)

    ids = torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)
    try:
        with torch.no_grad(), intercept(layers, skip):
            given = accepted(model, use_cache=False, output_router_logits=False)
            return bool(model(input_ids=ids, **given).logits.numel() == 3 * vocabulary)
    except Exception:  # a fixed view of the hidden states, for example
        return False


def _leaves(tensor: torch.Tensor) -> set[int]:
    """Ids of the leaf tensors that `tensor` depends on."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found: set[int] = set()
    nodes: list[Any] = [tensor.grad_fn]
    visited: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        nodes += [following for following, _ in node.next_functions]
    return found
