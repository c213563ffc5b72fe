"""Compiled decoder layers: `torch.compile`, one function for all layers of the same structure.

Weights are bound from slots, so they are inputs of the graph: neither their addresses nor a layer's number is
compiled in. A layer that cannot be compiled runs as transformers implements it, and a note names it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from horizon_lm.model.attention import IntervalMask, attend
from horizon_lm.words import count

Mode = Literal[True, "max-autotune"]
MOST_KINDS = 8  # kinds of layers; each is compiled separately
# Attributes for a layer's position. If its forward reads one, each layer gets a graph, up to torch's limit.
_POSITION = re.compile(r"^(layer|block)_?(idx|id|index|number)$|^idx$")
_OUTSIDE = "attention of packed or windowed rows"  # given to torch as the reason for a graph break
_MOST_WORDS = 160  # maximum characters of a torch.compile error in a note


class Listener(Protocol):
    """Receiver of reports on compilation: deviations from the settings (`tell`), and remarks."""

    def tell(self, note: str) -> None: ...
    def remark(self, text: str) -> None: ...


@dataclass
class Kind:
    """Layers of the same structure.

    whole, split: the compiled layer as one graph, and with attention outside of graphs. graphs: number
    compiled so far. refusal: why these layers run uncompiled, in words.
    """

    name: str
    layers: int
    whole: Callable[..., Any]
    split: Callable[..., Any]
    graphs: int = 0
    refusal: str | None = None


class CompiledLayers:
    """The compiled decoder layers of a model.

    hooked: whether a layer has forward hooks, which compiled code does not call. mode: `max-autotune` also
    times candidate kernels. backend: torch.compile's; tests use others than inductor.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        hooked: Sequence[bool],
        mode: Mode,
        listener: Listener,
        backend: str = "inductor",
    ) -> None:
        self._layers, self._listener = layers, listener
        alike: dict[Any, list[int]] = {}
        for number, layer in enumerate(layers):
            alike.setdefault((hooked[number], _traits(layer)), []).append(number)
        self.kinds: list[Kind] = []
        self._kind_of: dict[int, Kind] = {}
        options = _options(mode) if backend == "inductor" else None
        for numbers in alike.values():
            name = type(layers[numbers[0]]).__name__
            place = f"{name}_{len(self.kinds)}"
            whole = torch.compile(_own(place), backend=backend, options=options, fullgraph=True)
            split = torch.compile(_own(f"{place}_split"), backend=backend, options=options)
            kind = Kind(name, len(numbers), whole, split)
            self.kinds.append(kind)
            self._kind_of |= dict.fromkeys(numbers, kind)
            if hooked[numbers[0]]:
                self._refuse(kind, "its router logits are read by hooks, which compiled code does not call")
            elif len(alike) > MOST_KINDS:
                self._refuse(kind, f"the model has {count(len(alike), 'kind')} of layers")

    def is_compiled(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) runs compiled, as far as is known."""
        return self._kind_of[layer].refusal is None

    def run(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Call layer `layer` (0-based). If compilation fails, it runs uncompiled from now on, with the same
        random numbers."""
        module, kind = self._layers[layer], self._kind_of[layer]
        if kind.refusal is not None:
            return module(*args, **kwargs)
        states = _random_states(args[0].device)
        try:
            return self._run_compiled(kind, module, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any class: dynamo, inductor, the C++ compiler
            for generator, state in states:
                generator.set_state(state)
            output = module(*args, **kwargs)  # raises if the layer itself is at fault
            self._refuse(kind, f"torch.compile failed: {_in_words(error)}")
            return output

    def _run_compiled(self, kind: Kind, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        before, broken, began = _graphs(), _breaks(), time.perf_counter()
        if any(isinstance(value, IntervalMask) for value in (*args, *kwargs.values())):
            with _attention_outside():
                output = kind.split(module, *map(_opaque, args), **{k: _opaque(v) for k, v in kwargs.items()})
        else:
            output = kind.whole(module, *args, **kwargs)
        graphs = _graphs() - before
        if graphs > 0:
            kind.graphs += graphs
            unforeseen = [reason for reason in _breaks() - broken if _OUTSIDE not in reason]
            if unforeseen:
                self._refuse(kind, f"torch.compile cut it into pieces: {_first_line(unforeseen[0])}")
            again = "again " if kind.graphs > graphs else ""
            self._listener.remark(
                f"compiled {kind.name} {again}in {time.perf_counter() - began:.1f} s: "
                f"{count(graphs, 'graph')} for {count(kind.layers, 'layer')}"
            )
        return output

    def _refuse(self, kind: Kind, reason: str) -> None:
        kind.refusal = reason
        self._listener.tell(f"{kind.name} ({count(kind.layers, 'layer')}) runs uncompiled because {reason}")


def _own(name: str) -> Callable[..., Any]:
    """Return a function with its own code object. torch.compile keeps compiled versions, and limits their
    number, per code object, and transformers' classes share that of their forward."""
    return FunctionType(_layer.__code__.replace(co_name=name), globals(), name)


def _layer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _traits(layer: nn.Module) -> tuple:
    """Return what layers of the same structure have in common."""
    found = []
    for path, module in layer.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not _POSITION.search(name)
        }
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(n, t.shape, t.dtype, t.requires_grad) for n, t in tensors if t is not None]
        found.append((path, type(module), tuple(sorted(plain.items())), tuple(shapes)))
    return tuple(found)


def _options(mode: Mode) -> dict[str, Any]:
    """Inductor's options.

    Random numbers are those of eager mode in any graph. CUDA graphs, part of torch's max-autotune, are
    excluded: they record addresses, and weights change slots.
    """
    from torch._inductor import list_mode_options

    options = list_mode_options("max-autotune-no-cudagraphs") if mode == "max-autotune" else {}
    return {**options, "fallback_random": True, "triton.cudagraphs": False}


class _Opaque:
    """Wrapper that hides an interval mask from torch.compile, whose guards would read its documents."""

    def __init__(self, mask: IntervalMask) -> None:
        self.mask = mask


def _opaque(value: Any) -> Any:
    return _Opaque(value) if isinstance(value, IntervalMask) else value


def _attend_outside(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return attend(module, query, key, value, mask.mask if isinstance(mask, _Opaque) else mask, **kwargs)


@contextmanager
def _attention_outside() -> Iterator[None]:
    """While open, `sdpa` attends outside of graphs, since documents differ from batch to batch."""
    from transformers import AttentionInterface

    was = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", _outside())
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it runs eagerly, silently
            yield
    finally:
        AttentionInterface.register("sdpa", was)


@cache
def _outside() -> Callable[..., Any]:
    return torch.compiler.disable(_attend_outside, reason=_OUTSIDE)


def _random_states(device: torch.device) -> list[tuple[torch.Generator, torch.Tensor]]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return [(generator, generator.get_state()) for generator in generators]


def _graphs() -> int:
    """Return the number of graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _breaks() -> set[str]:
    """Return the reasons of torch.compile's graph breaks in this process."""
    from torch._dynamo.utils import counters

    return set(counters["graph_break"])


def _in_words(error: Exception) -> str:
    explained = re.search(r"Explanation: .*", str(error))  # dynamo's first line is only a heading
    return f"{type(error).__name__}: {_first_line(explained[0] if explained else str(error))}"


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= _MOST_WORDS else line[: _MOST_WORDS - 3] + "..."
