"""The matrix products of one layer, observed while it runs on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from horizon_lm.engine.ends import forward_prologue
from horizon_lm.model.anatomy import tensors_in
from horizon_lm.model.capture import Call, run_layer
from horizon_lm.plan.work import ATTENTION, ELEMENTWISE, WorkMeter, aten, flops_of_call
from horizon_lm.plan.working_set import Built, empty_weights, without_values

_MOST_OPERATIONS = 10_000  # of a run of a layer: about five seconds
# Sequences: tokens are shared out evenly among 2 to 10, 60, 72, 160, 256, 384, 512, ... experts.
BATCH = 315 << 9


class TooManyOperationsError(Exception):
    """A layer loops over tokens or sequences, which takes too long to count."""


class Product(NamedTuple):
    """flops: of all tokens. out: tells whether a gradient passes. owners: indices in the unit of parameters
    that were multiplied; none for two activations. groups: of a parameter, each multiplied with rows of its
    own. fused: attention by torch's kernels. wide: one row or column per token."""

    flops: int
    out: torch.Tensor
    owners: tuple[int, ...]
    groups: int
    fused: bool
    wide: bool


@dataclass
class Seen:
    """A run of a layer on `tokens` tokens. products: each with whether a gradient passes. choices: (number of
    candidates, number chosen), in order. gathered: parameters from which rows were taken. masks: (limit, in
    chunks) of the masks used. operations: their number."""

    tokens: int
    length: int
    products: list[tuple[Product, bool]] = field(default_factory=list)
    choices: list[tuple[int, int]] = field(default_factory=list)
    gathered: set[int] = field(default_factory=set)
    masks: set[tuple[int, bool]] = field(default_factory=set)
    operations: int = 0

    @property
    def has_products(self) -> bool:
        """Whether activations are multiplied, other than by torch's attention kernels."""
        return any(not (p.owners or p.fused) for p, _ in self.products)

    def between(self, learned: bool, *, fused: bool = False, wide: bool = False) -> float:
        """FLOPs per token of products of activations."""
        found = (p for p, is_learned in self.products if not p.owners and is_learned == learned)
        return sum(p.flops for p in found if (p.fused, p.wide) == (fused, wide)) / self.tokens


class Counting:
    """While open, layers can be run on `length` tokens in each of some sequences."""

    def __init__(self, built: Built, length: int, batch: int = BATCH) -> None:
        self._skeleton, self._length, self._batch = built.skeleton, length, batch
        self._device = _device(built)
        self._mode = built.mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._meter, self._stack = ProductMeter(), ExitStack()

    def __enter__(self) -> Counting:
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(self._meter)
            embeds, inputs = without_values(self._skeleton, self._batch, self._length, self._device)
            weights = empty_weights(self._skeleton, 0, self._device)
            with _masks_noted(self._meter.note_mask):
                self._hidden, self._call = forward_prologue(self._skeleton, weights, embeds, inputs)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def masks_of(self, layer: int) -> frozenset[tuple[int, bool]]:
        """(limit, in chunks) of the masks that a layer receives."""
        masks = self._meter.masks
        given = tensors_in(list(self._call.layers[layer]))
        return frozenset(masks[_storage(t)] for t in given if _storage(t) in masks)

    def run(self, layer: int) -> Seen:
        skeleton, unit = self._skeleton, layer + 1
        call = Call(self._call.layers, self._call.inputs, [[] for _ in range(skeleton.num_layers)])
        weights = empty_weights(skeleton, unit, self._device)
        hidden = self._hidden.detach().requires_grad_()
        with torch.enable_grad(), skeleton.bound(unit, weights, grad=True) as tensors:
            self._meter.begin(tensors, self._batch, self._length)
            # not the leaf itself, into which a layer may not write
            return self._meter.end(run_layer(skeleton, layer, call, hidden.view_as(hidden)))


def _device(built: Built) -> torch.device:
    """The device of the model's buffers, which take part as they are."""
    buffers = (b.device for b in built.skeleton.model.buffers())
    return next((device for device in buffers if device.type != "meta"), torch.device("cpu"))


class ProductMeter(WorkMeter):
    """Records which tensors each matrix product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, tuple[int, bool]] = {}
        self._held: list[Any] = []  # keeps storages alive, so that their numbers stay unique
        self._owners: dict[int, Callable[[torch.Tensor], tuple[int, ...]]] = {}
        self._products: list[Product] = []
        self._seen: Seen | None = None

    def note_mask(self, mask: torch.Tensor, limit: int, in_chunks: bool) -> torch.Tensor:
        self._held.append(mask)
        self.masks[_storage(mask)] = limit, in_chunks
        return mask

    def begin(self, parameters: dict[str, torch.Tensor], batch: int, length: int) -> None:
        """parameters: as bound, in the unit's order."""
        self._seen, self._products, self._owners = Seen(batch * length, length), [], {}
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for place, tensor in enumerate(parameters.values()):
            begin = int(tensor.storage_offset())
            runs.setdefault(_storage(tensor), []).append((begin, begin + tensor.numel(), place))
        self._held.append(parameters)
        for storage, ranges in runs.items():
            self._owners[storage] = partial(_within, ranges)

    def end(self, output: torch.Tensor) -> Seen:
        assert self._seen is not None
        seen, self._seen = self._seen, None
        nodes = _nodes(output)
        seen.products = [(p, p.out.grad_fn in nodes) for p in self._products]
        return seen

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        masks = {self.masks[_storage(t)] for t in tensors if _storage(t) in self.masks}
        if self._seen is not None:
            self._seen.operations += 1
            if self._seen.operations > _MOST_OPERATIONS:
                raise TooManyOperationsError
            self._seen.masks.update(masks)
            self._look(func, args, kwargs, tensors, results)
        elif len(masks) == 1:  # a mask derived from another
            for result in results:
                self.note_mask(result, *next(iter(masks)))

    def _look(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        tensors: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        assert self._seen is not None
        owners = [self._owned(t) for t in tensors]
        if func._overloadpacket is aten.topk:
            self._seen.choices.append((args[0].shape[args[2] if len(args) > 2 else -1], args[1]))
        if func._overloadpacket in _GATHERS and owners[0]:
            self._seen.gathered.update(owners[0])
        kind, flops = flops_of_call(func, args, kwargs, results[0]) if results else (ELEMENTWISE, 0)
        if kind != ELEMENTWISE:
            self._note_product(func, args, kind, flops, results[0])
        elif tensors and all(self._is_of_parameters(t) for t in tensors):
            # A parameter in another dtype, order or scale, or with the product of an adapter's added.
            for result in results:
                self._own(result, {place for some in owners for place in some})

    def _note_product(self, func: Any, args: tuple, kind: str, flops: int, out: torch.Tensor) -> None:
        assert self._seen is not None
        if func._overloadpacket is aten.convolution:  # multiplies each of its weights once per token
            return
        first, fused = int(func._overloadpacket in _WITH_BIAS), kind == ATTENTION
        a, b = args[first : first + 2]
        sides = self._owned(a), self._owned(b)
        if self._is_of_parameters(a) and self._is_of_parameters(b):  # once, regardless of the tokens
            if not first or self._is_of_parameters(args[0]):
                self._own(out, self._owned(args[0]) if first else ())
            return
        owners = sides[0] or sides[1]
        if not owners and not fused and a.shape[-1] == 1:  # an outer product: nothing is summed
            return
        weight = a if sides[0] else b
        groups = weight.shape[0] if owners and out.dim() == 3 and weight.dim() == 3 else 1
        wide = not fused and self._seen.length in (*a.shape[-2:], *b.shape[-2:])
        self._products.append(Product(flops, out, owners, groups, fused, wide))

    def _is_of_parameters(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        return _storage(tensor) in self._owners

    def _own(self, tensor: torch.Tensor, places: Iterable[int]) -> None:
        """Note that a tensor is made of parameters alone: a copy of those at `places`, or of none."""
        if _storage(tensor) not in self._owners:
            self._held.append(tensor)
            self._owners[_storage(tensor)] = partial(_always, tuple(sorted(places)))

    def _owned(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The unit's parameters of which a tensor is a part or a copy."""
        find = self._owners.get(_storage(tensor))
        return find(tensor) if find is not None else ()


_WITH_BIAS = {aten.addmm, aten.baddbmm}
_GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}


def _within(ranges: list[tuple[int, int, int]], tensor: torch.Tensor) -> tuple[int, ...]:
    at = tensor.storage_offset()
    return tuple(place for begin, end, place in ranges if begin <= at < end)


def _always(places: tuple[int, ...], _: torch.Tensor) -> tuple[int, ...]:
    return places


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nodes(output: torch.Tensor) -> set[Any]:
    """Nodes of the graph behind a tensor."""
    found: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def _masks_noted(note: Callable[[torch.Tensor, int, bool], torch.Tensor]) -> Iterator[None]:
    """While open, transformers' masks are fake tensors, and `note` is told of those with a limit."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    def make(is_bool: bool, **kwargs: Any) -> torch.Tensor | None:
        limit = kwargs.get("local_size")
        if limit is None and is_bool and kwargs.get("allow_is_causal_skip", True):
            return None
        shape = kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"]
        dtype = torch.bool if is_bool else kwargs.get("dtype", torch.float32)
        mask = torch.zeros((1, 1, *shape[2:]), dtype=dtype, device=kwargs.get("device", "cpu")).expand(shape)
        return mask if limit is None else note(mask, int(limit), _in_chunks(kwargs["mask_function"]))

    was = dict(masks._local_mapping)
    for name in masks.valid_keys():
        masks[name] = partial(make, name != "eager")
    try:
        yield
    finally:
        masks._local_mapping.clear()
        masks._local_mapping.update(was)


def _in_chunks(function: Any) -> bool:
    """Whether a mask is composed of one that separates chunks."""
    parts = tree_leaves([cell.cell_contents for cell in getattr(function, "__closure__", None) or ()])
    name = getattr(function, "__qualname__", "")
    return name.startswith("chunked_overlay") or any(_in_chunks(part) for part in parts if callable(part))
