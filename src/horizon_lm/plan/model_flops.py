"""How often each parameter of a layer multiplies a token, and which products of activations a layer makes.

A layer of each kind is run forward on tensors without memory, and every matrix product is looked at. Those
with a parameter say what share of it, of experts above all, a token visits. Those of two activations grow
with the length of a sequence (states of linear attention and state spaces) or with its square (attention);
two lengths tell which. Nothing is known of any model family, but for `_local_window`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from horizon_lm.engine.ends import forward_prologue
from horizon_lm.model.anatomy import tensors_in
from horizon_lm.model.capture import Call, run_layer
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.plan.work import ATTENTION, ELEMENTWISE, WorkMeter, aten, flops_of_call
from horizon_lm.plan.working_set import Built, empty_weights, without_values

# Tokens of a sequence. Few tell all of a layer that goes from token to token, in many operations. More fill
# the blocks of linear attention, of up to 256 tokens, which look like attention else.
_FEW, _MORE = (22, 44), (768, 1536)
_LONG = 1 << 17  # beyond what a layer selects for a query
_MOST_OPERATIONS = 10_000  # of a run of a layer: about five seconds
# Sequences: tokens are shared out evenly among 2 to 10, 60, 72, 160, 256, 384, 512, ... experts.
_BATCH = 315 << 9


class TooManyOperationsError(Exception):
    """A layer loops over tokens or sequences, and takes too long to count."""


class Pairs(NamedTuple):
    """Products of a query with a key and of its weight with the value.

    flops: forward, a pair. learned: whether a gradient passes. most: keys that a query sees at most, if there
    is a limit; in_chunks: those of its chunk, where it would else be those before it.
    """

    flops: float
    learned: bool
    most: int | None = None
    in_chunks: bool = False


@dataclass(frozen=True)
class LayerFlops:
    """visits: of each parameter of the unit, how often it multiplies a token (an expert's: the share of the
    tokens that visit it). unlearned: places of those that no gradient reaches. states: forward FLOPs a token
    of products between activations that do not grow with the sequence."""

    visits: tuple[float, ...]
    unlearned: tuple[int, ...]
    states: float
    pairs: tuple[Pairs, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerFlops:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values | {"pairs": tuple(Pairs(*row) for row in values["pairs"])})


@dataclass(frozen=True)
class Counted:
    """layers: of each kind; kind_of: of each layer. lookups: parameters of which rows are looked up, and
    nothing else."""

    layers: tuple[LayerFlops, ...]
    kind_of: tuple[int, ...]
    lookups: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counted:
        layers = tuple(LayerFlops.from_json(row) for row in values["layers"])
        return cls(layers, tuple(values["kind_of"]), tuple(values["lookups"]))


def kinds_of_layers(skeleton: Skeleton) -> tuple[list[int], list[int]]:
    """(the first layer of each kind, the kind of each layer). Layers are alike that have the same parameters,
    the same modules and the same plain attributes, their own number apart."""
    kinds: dict[Any, int] = {}
    first: list[int] = []
    kind_of: list[int] = []
    for i, layer in enumerate(skeleton.layers):
        rows = tuple((p.shape, p.trainable, p.compute_dtype) for p in skeleton.units[i + 1].parameters)
        key = rows, tuple(_attributes(module) for module in layer.modules())
        if key not in kinds:
            kinds[key] = len(first)
            first.append(i)
        kind_of.append(kinds[key])
    return first, kind_of


def _attributes(module: nn.Module) -> tuple:
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, bool)) and "layer_idx" not in name and "layer_id" not in name
    }
    return type(module).__name__, tuple(sorted(plain.items()))


def count_layers(built: Built, kind_of: Sequence[int]) -> Counted:
    """kind_of: layers that are alike have the same number. Raises whatever the model's code does on tensors
    without values."""
    with _quiet():
        places, found, runs = _runs(built, kind_of)
        selected = [_most_selected(built, *item) for item in zip(places, runs, strict=True)]
    skeleton = built.skeleton
    layers = tuple(
        _conclude(skeleton, layer, run, most) for layer, run, most in zip(places, runs, selected, strict=True)
    )
    tied = {skeleton.anatomy.embedding} if skeleton.anatomy.tied else set()
    names = (p.name for unit in skeleton.units for p in unit.parameters)
    lookups = tuple(name for name in names if name not in tied and skeleton.is_embedding(name))
    return Counted(layers, tuple(found), lookups)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, torch does not log what fails on tensors without values."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


class _Runs(NamedTuple):
    """What a layer did on sequences of two lengths; the same twice where the first tells all."""

    short: _Seen
    long: _Seen

    @property
    def has_blocks(self) -> bool:
        """Whether it may compute in blocks of tokens: not where it goes from token to token."""
        short, long = self
        return short is not long and long.operations - short.operations < long.length - short.length


def _runs(built: Built, kind_of: Sequence[int]) -> tuple[list[int], list[int], list[_Runs]]:
    """(the first layer of each kind, the kind of each layer, masks considered, and runs of each kind)."""
    kinds: dict[Any, int] = {}
    with _Counting(built, _FEW[0]) as counting:
        found = [
            kinds.setdefault((kind, counting.masks_of(i), _local_window(built.skeleton, i)), len(kinds))
            for i, kind in enumerate(kind_of)
        ]
        places = [found.index(kind) for kind in range(len(kinds))]
        try:
            first = {layer: counting.run(layer) for layer in places}
        except TooManyOperationsError:
            raise
        except Exception:  # some take whole blocks only
            first = {}
    runs = {layer: _Runs(seen, seen) for layer, seen in first.items()}
    runs |= _second(built, {layer: seen for layer, seen in first.items() if seen.has_products}, _FEW[1])
    blocks = [layer for layer in places if layer not in runs or runs[layer].has_blocks]
    try:
        if blocks:
            with _Counting(built, _MORE[0]) as counting:
                first = {layer: counting.run(layer) for layer in blocks}
            runs |= _second(built, first, _MORE[1])
    except Exception:  # some hold tables of fewer positions
        if any(layer not in runs for layer in places):
            raise
    return places, found, [runs[layer] for layer in places]


def _second(built: Built, first: dict[int, _Seen], length: int) -> dict[int, _Runs]:
    if not first:
        return {}
    with _Counting(built, length) as counting:
        return {layer: _Runs(seen, counting.run(layer)) for layer, seen in first.items()}


def _local_window(skeleton: Skeleton, layer: int) -> int | None:
    """gpt_neo alone cuts a window out of a buffer of its own, which has no values here."""
    config = skeleton.config
    if getattr(config, "model_type", "") == "gpt_neo" and config.attention_layers[layer] == "local":
        return int(config.window_size)
    return None


def _share_of_real_experts(skeleton: Skeleton) -> float:
    """longcat_flash alone has experts without arithmetic, which a run without values cannot tell apart."""
    zero = int(getattr(skeleton.config, "zero_expert_num", 0) or 0)
    return skeleton.config.n_routed_experts / (skeleton.config.n_routed_experts + zero) if zero else 1.0


class _Product(NamedTuple):
    """flops: of all tokens. out: tells whether a gradient passes. owners: places in the unit of the
    parameters that were multiplied; none for two activations. groups: of a parameter, each multiplied with
    rows of its own. fused: attention by torch's own kernels. wide: there is a row or column a token."""

    flops: int
    out: torch.Tensor
    owners: tuple[int, ...]
    groups: int
    fused: bool
    wide: bool


@dataclass
class _Seen:
    """What a run of a layer on `tokens` tokens did. products: with whether a gradient passes. choices:
    (number of which some were chosen, how many), in order. gathered: parameters of which rows were taken.
    masks: (limit, in chunks) of those that were used.
    operations: how many there were."""

    tokens: int
    length: int
    products: list[tuple[_Product, bool]] = field(default_factory=list)
    choices: list[tuple[int, int]] = field(default_factory=list)
    gathered: set[int] = field(default_factory=set)
    masks: set[tuple[int, bool]] = field(default_factory=set)
    operations: int = 0

    @property
    def has_products(self) -> bool:
        """Whether activations are multiplied, other than by torch's own attention."""
        return any(not (p.owners or p.fused) for p, _ in self.products)

    def between(self, learned: bool, *, fused: bool = False, wide: bool = False) -> float:
        """FLOPs a token of products of activations."""
        found = (p for p, is_learned in self.products if not p.owners and is_learned == learned)
        return sum(p.flops for p in found if (p.fused, p.wide) == (fused, wide)) / self.tokens


class _Counting:
    """While open, layers can be run on `length` tokens in each of some sequences."""

    def __init__(self, built: Built, length: int, batch: int = _BATCH) -> None:
        self._skeleton, self._length, self._batch = built.skeleton, length, batch
        self._device = _device(built)
        self._mode = built.mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._meter, self._stack = ProductMeter(), ExitStack()

    def __enter__(self) -> _Counting:
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
        """(limit, in chunks) of the masks that a layer is given."""
        masks = self._meter.masks
        given = tensors_in(list(self._call.layers[layer]))
        return frozenset(masks[_storage(t)] for t in given if _storage(t) in masks)

    def run(self, layer: int) -> _Seen:
        skeleton, unit = self._skeleton, layer + 1
        call = Call(self._call.layers, self._call.inputs, [[] for _ in range(skeleton.num_layers)])
        weights = empty_weights(skeleton, unit, self._device)
        hidden = self._hidden.detach().requires_grad_()
        with torch.enable_grad(), skeleton.bound(unit, weights, grad=True) as tensors:
            self._meter.begin(tensors, self._batch, self._length)
            # not the leaf itself, into which a layer may not write
            return self._meter.end(run_layer(skeleton, layer, call, hidden.view_as(hidden)))


def _device(built: Built) -> torch.device:
    """Where the model's buffers are: they take part as they are."""
    buffers = (b.device for b in built.skeleton.model.buffers())
    return next((device for device in buffers if device.type != "meta"), torch.device("cpu"))


class ProductMeter(WorkMeter):
    """Notes which tensors a matrix product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, tuple[int, bool]] = {}
        self._held: list[Any] = []  # so that no storage is given away under the same number
        self._owners: dict[int, Callable[[torch.Tensor], tuple[int, ...]]] = {}
        self._products: list[_Product] = []
        self._seen: _Seen | None = None

    def note_mask(self, mask: torch.Tensor, limit: int, in_chunks: bool) -> torch.Tensor:
        self._held.append(mask)
        self.masks[_storage(mask)] = limit, in_chunks
        return mask

    def begin(self, parameters: dict[str, torch.Tensor], batch: int, length: int) -> None:
        """parameters: as they are bound, in the unit's order."""
        self._seen, self._products, self._owners = _Seen(batch * length, length), [], {}
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for place, tensor in enumerate(parameters.values()):
            begin = int(tensor.storage_offset())
            runs.setdefault(_storage(tensor), []).append((begin, begin + tensor.numel(), place))
        self._held.append(parameters)
        for storage, ranges in runs.items():
            self._owners[storage] = partial(_within, ranges)

    def end(self, output: torch.Tensor) -> _Seen:
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
        elif len(masks) == 1:  # what the model makes of its mask
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
        elif tensors and all(owners):  # a parameter in another dtype, order or scale
            every = tuple(sorted({place for some in owners for place in some}))
            for result in results:
                if _storage(result) not in self._owners:
                    self._held.append(result)
                    self._owners[_storage(result)] = partial(_always, every)

    def _note_product(self, func: Any, args: tuple, kind: str, flops: int, out: torch.Tensor) -> None:
        assert self._seen is not None
        if func._overloadpacket is aten.convolution:  # with each of its weights once a token
            return
        first, fused = int(func._overloadpacket in _WITH_BIAS), kind == ATTENTION
        a, b = args[first : first + 2]
        sides = self._owned(a), self._owned(b)
        if all(sides):  # once, whatever the tokens
            return
        owners = sides[0] or sides[1]
        if not owners and not fused and a.shape[-1] == 1:  # all pairs of numbers, none added
            return
        weight = a if sides[0] else b
        groups = weight.shape[0] if owners and out.dim() == 3 and weight.dim() == 3 else 1
        wide = not fused and self._seen.length in (*a.shape[-2:], *b.shape[-2:])
        self._products.append(_Product(flops, out, owners, groups, fused, wide))

    def _owned(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The unit's parameters that a tensor is a part or a copy of."""
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
    """Of the graph behind a tensor."""
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
    """While open, transformers' masks are tensors without values, of which `note` learns what is limited."""
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
    """Whether a mask is put together from one that separates chunks."""
    parts = tree_leaves([cell.cell_contents for cell in getattr(function, "__closure__", None) or ()])
    name = getattr(function, "__qualname__", "")
    return name.startswith("chunked_overlay") or any(_in_chunks(part) for part in parts if callable(part))


def _most_selected(built: Built, layer: int, runs: _Runs) -> int | None:
    """Keys that a query attends to at most, where a layer selects them; None where it does not."""
    both = zip(runs.short.choices, runs.long.choices, strict=False)
    growing = [i for i, (a, b) in enumerate(both) if a[0] < b[0]]
    if not growing:
        return None
    with _Counting(built, _LONG, batch=1) as counting:
        number, chosen = counting.run(layer).choices[growing[-1]]
    return None if chosen >= number else chosen * (_LONG // number)


def _conclude(skeleton: Skeleton, layer: int, runs: _Runs, selected: int | None) -> LayerFlops:
    visits, unlearned = _visits(skeleton, layer, runs.short)
    real = _share_of_real_experts(skeleton)
    visits = tuple(times * real if times < 1 else times for times in visits)
    limits = [(most, False) for most in (_local_window(skeleton, layer), selected) if most is not None]
    states, pairs = 0.0, []
    for learned in (True, False):
        a_token, square = _growth(runs, learned)
        states += a_token
        if square:  # what only selects looks at all keys
            limit = min([*runs.short.masks, *limits], default=(None, False)) if learned else ()
            pairs.append(Pairs(square, learned, *limit))
    return LayerFlops(visits, unlearned, round(states, 6), tuple(pairs))


def _growth(runs: _Runs, learned: bool) -> tuple[float, float]:
    """FLOPs of products of activations: (of each token, of each pair of tokens)."""
    short, long = runs
    square = short.between(learned, fused=True) / short.length
    if short is long:
        return 0.0, round(square, 6)
    low, high = (seen.between(learned, wide=True) for seen in runs)
    grown = (high - low) / (long.length - short.length)
    # A pass over all pairs of blocks, if there is one, is left out: states do not need it.
    times = long.length / short.length
    states = (times * short.between(learned) - long.between(learned)) / (times - 1)
    return states + low - grown * short.length, round(square + grown, 6)


def _visits(skeleton: Skeleton, layer: int, seen: _Seen) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(how often each parameter multiplies a token, places of those that no gradient reaches)."""
    parameters = skeleton.units[layer + 1].parameters
    alike: dict[str, list[int]] = {}
    for place, parameter in enumerate(parameters):
        alike.setdefault(_role(parameter.name), []).append(place)
    times = dict.fromkeys(range(len(parameters)), 0.0)
    learned, multiplied = set(), set()
    for product, is_learned in seen.products:
        numel = sum(parameters[place].numel for place in product.owners)
        chosen = next((k / n for n, k in reversed(seen.choices) if n == product.groups > 1), 1.0)
        for place in product.owners:
            share = product.flops / (2 * numel * seen.tokens)
            times[place] += share * chosen if share >= 1 else share
            multiplied.add(place)
            if is_learned:
                learned.add(place)
    visits = [1.0] * len(parameters)
    for places in alike.values():  # experts are alike: which of them is run says nothing here
        if multiplied.intersection(places):
            mean = sum(times[place] for place in places) / len(places)
            for place in places:
                visits[place] = mean
        elif seen.gathered.intersection(places):
            for place in places:
                visits[place] = 0.0
    _follow_siblings(parameters, visits, multiplied)
    return tuple(visits), tuple(sorted(multiplied - learned))


def _role(name: str) -> str:
    """A parameter's name without the numbers of modules in a list."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _follow_siblings(parameters: Sequence[Any], visits: list[float], multiplied: set[int]) -> None:
    """What is added, as a bias is, goes with what its module multiplies."""
    of_module: dict[str, list[float]] = {}
    for place in multiplied:
        module = _role(parameters[place].name).rpartition(".")[0]
        of_module.setdefault(module, []).append(visits[place])
    for place, parameter in enumerate(parameters):
        shares = of_module.get(_role(parameter.name).rpartition(".")[0], [])
        if place not in multiplied and shares and max(shares) < 1:
            visits[place] = max(shares)
