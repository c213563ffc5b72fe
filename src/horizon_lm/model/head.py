"""The head's own modules, found once: what runs after the last layer, without the rest of the forward.

The forward of a causal language model calls a base model (embeddings, layers, usually a norm), then computes
logits from its first output. The head consists of the base model's modules after the last layer, then the
model's own forward with the base model replaced by their result. So projection, scaling and soft-capping are
the model's own code, without its masks, positions and checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from horizon_lm.model.anatomy import Anatomy, accepted, as_layer_output, intercept, split_hidden

_ROWS = 3  # hidden states of the trial runs


@dataclass(frozen=True)
class OwnHead:
    """The modules and functions that compute logits.

    base: the module whose output the model's forward turns into logits. chain: its modules after the last
    layer, each applied to the previous one's output. output: makes the base model's output from that of the
    last module.
    """

    model: Any
    base: nn.Module
    chain: tuple[nn.Module, ...]
    output: Callable[[torch.Tensor], Any]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute logits [1, n, vocabulary] of rows [1, n, ...]; the head's parameters must be bound."""
        for module in self.chain:
            rows = module(rows)
        given = self.output(rows)
        ids = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
        with forward_replaced(self.base, lambda *args, **kwargs: given):
            options = accepted(self.model, use_cache=False, output_router_logits=False)
            logits: torch.Tensor = self.model(input_ids=ids, **options).logits
        return logits


@contextmanager
def forward_replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While open, `function` is the module's forward."""
    own = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own  # type: ignore[method-assign]


def find_head(model: Any, anatomy: Anatomy) -> OwnHead | None:
    """Find the head's own modules by running the whole forward on a few made-up hidden states.

    Returns None if the model has another form, or if its head draws random numbers, which would differ from
    those of the whole forward. The parameters must be in memory, or fake.
    """
    layers: Any = model.get_submodule(anatomy.layers_path)
    watch = _Watch(model, anatomy.layers_path)

    def layer(i: int, *args: Any, **kwargs: Any) -> Any:
        hidden = split_hidden(args, kwargs)[0]
        if i == len(layers) - 1:
            watch.given = hidden = _made_up(hidden)
        return as_layer_output(hidden, anatomy.layer_outputs)

    ids = torch.zeros(1, _ROWS, dtype=torch.long, device=next(model.parameters()).device)
    given = accepted(model, use_cache=False, output_router_logits=False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            with intercept(layers, layer), watch.hooks():
                logits = model(input_ids=ids, **given).logits
            found = watch.found()
            return found if found is not None and _gives(found, watch.given, logits) else None
    except Exception:  # a model's code may do anything on hidden states of this shape
        return None


def _made_up(hidden: torch.Tensor) -> torch.Tensor:
    shape = (1, _ROWS, *hidden.shape[2:])
    return torch.randn(shape, dtype=torch.float32, device=hidden.device).to(hidden.dtype)


def _gives(head: OwnHead, given: torch.Tensor | None, logits: torch.Tensor) -> bool:
    """Whether the head alone gives the same bits and draws no random numbers. Fake tensors (the planner's)
    cannot tell; training checks again."""
    assert given is not None
    before = torch.default_generator.get_state()
    found = head.logits(given)
    if found.shape != logits.shape or found.dtype != logits.dtype:
        return False
    if isinstance(found, FakeTensor):
        return True
    same = torch.allclose(found, logits, rtol=0, atol=0, equal_nan=True)
    return same and torch.equal(before, torch.default_generator.get_state())


@dataclass
class _Watch:
    """Recorder of the modules outside the layers that run after the last layer, and of the base model's
    output."""

    model: Any
    layers_path: str
    given: torch.Tensor | None = None
    chain: list[nn.Module] = field(default_factory=list)
    bases: list[tuple[nn.Module, Any]] = field(default_factory=list)
    _last: torch.Tensor | None = None
    _version: int = 0
    _depth: int = 0
    _open: list[nn.Module] = field(default_factory=list)
    _broken: bool = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        layers = set(self.model.get_submodule(self.layers_path).modules())
        above = [self.layers_path.rsplit(".", n)[0] for n in range(1, self.layers_path.count(".") + 1)]
        handles = []
        for path, module in self.model.named_modules():
            if not path or module in layers:
                continue
            before, after = (self._enter, self._leave) if path in above else (self._begin, self._end)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._open.pop()
        if not self._open:
            self.bases.append((module, output))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth or self.given is None or not self._open:
            return
        follows = len(args) == 1 and not kwargs and self._is_last(args[0])
        self._broken |= not follows or not isinstance(output, torch.Tensor)
        if not self._broken:
            self.chain.append(module)
            self._last, self._version = output, output._version

    def _is_last(self, value: Any) -> bool:
        """Whether this is the output of the chain so far: unmodified, or a view that changes nothing."""
        last = self.given if self._last is None else self._last
        assert last is not None
        if not isinstance(value, torch.Tensor) or last._version != self._version:
            return False
        return value is last or _place(value) == _place(last)

    def found(self) -> OwnHead | None:
        if self._broken or len(self.bases) != 1:
            return None
        base, output = self.bases[0]
        first, make = _maker(output)
        return OwnHead(self.model, base, tuple(self.chain), make) if make and self._is_last(first) else None


def _place(tensor: torch.Tensor) -> tuple:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _maker(output: Any) -> tuple[Any, Callable[[torch.Tensor], Any] | None]:
    """(the first value of a base model's output, a function that makes an output from another one); no
    function if anything follows it."""
    if isinstance(output, torch.Tensor):
        return output, lambda value: value
    if isinstance(output, tuple):
        return output[0], None if any(map(_holds, output[1:])) else lambda value: (value, *output[1:])
    if not isinstance(output, dict) or not output:
        return None, None
    (name, first), *rest = output.items()
    if any(_holds(value) for _, value in rest):
        return first, None
    return first, lambda value: type(output)(**{name: value})


def _holds(value: Any) -> bool:
    return value is not None and not (isinstance(value, (tuple, list, dict)) and not value)
