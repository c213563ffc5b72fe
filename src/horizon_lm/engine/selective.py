"""Sub-layer keeping: a layer is recomputed, except for the outputs of its matrix products or attention.

A `Selection` makes the pair of contexts that `torch.utils.checkpoint` takes as `context_fn`. It does what
torch's `create_selective_checkpoint_contexts` does, with these differences:

- An op that draws random numbers is run again, so that later ops of the recomputation draw the same ones.
- An output that the layer writes into is computed again; torch raises an error in the backward pass.
- Outputs that the recomputation, which stops early, never reaches are freed at the end of the forward pass.
- Every kept output must be used exactly once; otherwise the layer computed something else the second time.
- It neither imports torch's compiler (80 MB) nor spends a compiler's bookkeeping on each op.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import _StopRecomputationError

from horizon_lm.errors import UnsupportedModelError
from horizon_lm.model.tiling import in_tile
from horizon_lm.schedule.step_spec import PRODUCTS

# Matrix products as the dispatcher sees them: linear, matmul and einsum arrive as these. Convolutions are not
# among them: those of state-space layers are depthwise, with about as little arithmetic as elementwise ops.
_PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::addbmm",
        "aten::mv",
        "aten::addmv",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
        "transformers::grouped_mm_fallback",
    }
)
# Forward kernels of scaled dot-product attention: torch's, `torch.nn.attention.varlen`, flash-attn's custom
# ops and those of the Hub. Without such a kernel attention is two batched products.
_ATTENTION = re.compile(r"attn|attention")
_OTHER_ATTENTION = re.compile(r"backward|bwd|combine|metadata|scheduler")


class _Rule(NamedTuple):
    """keeps: whether outputs of an op are kept at all. dropout: position and name of its dropout argument.
    is_seeded: it may draw random numbers. written: positions and names of arguments that it writes into."""

    keeps: bool
    dropout: tuple[int, str] | None
    is_seeded: bool
    written: tuple[tuple[int, str], ...]


@cache
def is_attention(name: str) -> bool:
    """Whether `name`, such as aten::mm, is a forward attention kernel."""
    return _ATTENTION.search(name) is not None and _OTHER_ATTENTION.search(name) is None


@cache
def is_product(name: str) -> bool:
    """Whether `name`, such as aten::mm, is a matrix product or a forward attention kernel."""
    return name in _PRODUCTS or is_attention(name)


@cache
def _rule(policy: str, func: Any) -> _Rule:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator
        return _Rule(False, None, False, ())
    arguments = [(i, a) for i, a in enumerate(schema.arguments)]
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    dropout = next(((i, a.name) for i, a in arguments if "dropout" in a.name), None)
    chosen = is_product(schema.name) if policy == PRODUCTS else is_attention(schema.name)
    is_new = not any(r.alias_info is not None for r in schema.returns)
    is_seeded = torch.Tag.nondeterministic_seeded in func.tags
    return _Rule(chosen and is_new and not written, dropout, is_seeded, written)


class _Kept(NamedTuple):
    """Output of an op, detached; None if it has to be computed again. given: shapes of its arguments."""

    func: Any
    given: tuple[torch.Size, ...]
    output: Any


class Selection:
    """The outputs that one layer keeps from a forward pass to its recomputation.

    policy: `attention` or `products`. name: the layer's, for errors. Kept outputs never alias weights, nor
    the layer's input or output. Nothing is kept of an MLP in tiles, each of which is recomputed by itself.
    """

    def __init__(self, policy: str, name: str) -> None:
        self._policy, self._name = policy, name
        self._kept: deque[_Kept] = deque()
        self._needed = 0

    def contexts(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The `context_fn` of `torch.utils.checkpoint.checkpoint`."""
        return _Forward(self), _Recompute(self)

    def finish(self, output: torch.Tensor) -> None:
        """End the forward pass of the layer, which returned `output`."""
        while len(self._kept) > self._needed:
            self._kept.pop()
        self.forget([output])

    def forget(self, tensors: list[torch.Tensor]) -> None:
        """Compute again what shares memory with one of these tensors."""
        storages = {t.untyped_storage()._cdata for t in tensors}
        for i, kept in enumerate(self._kept):
            if not storages.isdisjoint(t.untyped_storage()._cdata for t in _tensors(kept.output)):
                self._kept[i] = kept._replace(output=None)

    def note_saved(self) -> None:
        """Note that autograd saves a tensor: the recomputation will come this far."""
        self._needed = len(self._kept)

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an op of the forward pass."""
        rule = _rule(self._policy, func)
        if rule.written:
            self.forget(_tensors([_argument(place, args, kwargs) for place in rule.written]))
        if not rule.keeps or in_tile():
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        state = _random_state(rule, given)
        output = func(*args, **kwargs)
        is_dropped = rule.dropout is not None and _argument(rule.dropout, args, kwargs)
        draws = is_dropped or _random_state(rule, given) != state
        kept = None if draws else tree_map(_detached, output)
        self._kept.append(_Kept(func, tuple(t.shape for t in given), kept))
        return output

    def run_again(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an op of the recomputation, or return what it returned."""
        rule = _rule(self._policy, func)
        if not rule.keeps or in_tile() or not self._kept:
            return func(*args, **kwargs)
        kept = self._kept.popleft()
        if kept.func is not func or kept.given != tuple(t.shape for t in _tensors((args, kwargs))):
            raise self.differs(f"{kept.func} became {func}")
        return func(*args, **kwargs) if kept.output is None else kept.output

    def check_used(self) -> None:
        """Raise UnsupportedModelError unless the recomputation used every kept output."""
        if self._kept:
            raise self.differs(f"{len(self._kept)} products are missing, the first is {self._kept[0].func}")

    def differs(self, what: str) -> UnsupportedModelError:
        self._kept.clear()
        return UnsupportedModelError(
            f"{self._name} computes something else when it is run again: {what}",
            hint="set activations to keep or recompute",
        )


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never compiled, so torch neither wraps each call nor imports its compiler."""
        return False

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self._selection = selection


class _Forward(_Mode):
    def __enter__(self) -> Any:
        super().__enter__()
        # Around the hooks of `checkpoint`, which were entered before.
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[misc]
        self._hooks = saved_tensors_hooks(_noting(self._selection, pack), unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self._selection.run(func, args, kwargs or {})


class _Recompute(_Mode):
    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None or issubclass(kind, _StopRecomputationError):
            self._selection.check_used()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self._selection.run_again(func, args, kwargs or {})


def _noting(selection: Selection, pack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def note(tensor: torch.Tensor) -> Any:
        selection.note_saved()
        return pack(tensor)

    return note


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _detached(value: Any) -> Any:
    """An output whose graph holds this selection would form a cycle with it."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _argument(place: tuple[int, str], args: tuple, kwargs: dict[str, Any]) -> Any:
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)


def _random_state(rule: _Rule, given: list[torch.Tensor]) -> int | bytes | None:
    """State of the generator that an op on these tensors may draw from; on CUDA its offset, which the host
    knows. None if it draws from none, or the tensors have no values."""
    if not rule.is_seeded or isinstance(given[0], FakeTensor):
        return None
    device = given[0].device
    if device.type != "cuda":
        return torch.default_generator.get_state().numpy().tobytes()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index].get_offset()
