"""Count how often each parameter of a layer multiplies a token, and the layer's products of activations.

A layer of each kind runs forward on fake tensors, and every matrix product is examined (`plan.products`).
Those with a parameter tell what share of it (of experts above all) a token visits. Those of two activations
grow with the sequence length (states of linear attention and state spaces) or with its square (attention);
two lengths tell which. Two model families are special: `_local_window`, `_share_of_real_experts`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from horizon_lm.model.adapters import is_replaced
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.plan.products import Counting, Seen, TooManyOperationsError
from horizon_lm.plan.working_set import Built

# Tokens of a sequence. Few suffice for a layer that loops over tokens, in many operations. More fill the
# blocks of linear attention (up to 256 tokens), which otherwise look like attention.
_FEW, _MORE = (22, 44), (768, 1536)
_LONG = 1 << 17  # beyond what a layer selects for a query


class Pairs(NamedTuple):
    """Products of a query with a key, and of its weight with the value.

    flops: forward, per pair. learned: whether a gradient passes. most: the limit of keys that a query sees,
    if any; in_chunks: keys of its chunk rather than those before it.
    """

    flops: float
    learned: bool
    most: int | None = None
    in_chunks: bool = False


@dataclass(frozen=True)
class LayerFlops:
    """visits: how often each parameter of the unit multiplies a token (an expert: the share of tokens that
    visit it). unlearned: indices of those that no gradient reaches. states: forward FLOPs per token of
    products between activations that do not grow with the sequence."""

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
    """layers: by kind. kind_of: the kind of each layer. lookups: parameters that multiply no token of text:
    tables of rows, modules of the base that an adapter trains a copy of, and a projector of pictures."""

    layers: tuple[LayerFlops, ...]
    kind_of: tuple[int, ...]
    lookups: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counted:
        layers = tuple(LayerFlops.from_json(row) for row in values["layers"])
        return cls(layers, tuple(values["kind_of"]), tuple(values["lookups"]))


def kinds_of_layers(skeleton: Skeleton) -> tuple[list[int], list[int]]:
    """Return (the first layer of each kind, the kind of each layer).

    Layers are alike if they have the same parameters, modules and plain attributes, apart from their number.
    """
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
    """Count the layers of a model. Raises whatever the model's code raises on fake tensors.

    kind_of: layers that are alike have the same number.
    """
    with _quiet():
        places, found, runs = _runs(built, kind_of)
        selected = [_most_selected(built, *item) for item in zip(places, runs, strict=True)]
    skeleton = built.skeleton
    layers = tuple(
        _conclude(skeleton, layer, run, most) for layer, run, most in zip(places, runs, selected, strict=True)
    )
    tied = {skeleton.anatomy.embedding} if skeleton.anatomy.tied else set()
    names = [p.name for unit in skeleton.units for p in unit.parameters]
    parts = skeleton.pictures

    def is_visited(name: str) -> bool:
        if is_replaced(name) or (parts is not None and parts.is_vision(name)):
            return False
        return name in tied or not skeleton.is_embedding(name)

    lookups = tuple(name for name in names if not is_visited(name))
    return Counted(layers, tuple(found), lookups)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, torch does not log failures on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


class _Runs(NamedTuple):
    """A layer's runs on sequences of two lengths; the same twice if one tells all."""

    short: Seen
    long: Seen

    @property
    def has_blocks(self) -> bool:
        """Whether it may compute in blocks of tokens, rather than token by token."""
        short, long = self
        return short is not long and long.operations - short.operations < long.length - short.length


def _runs(built: Built, kind_of: Sequence[int]) -> tuple[list[int], list[int], list[_Runs]]:
    """(the first layer of each kind, the kind of each layer, masks considered, and runs of each kind)."""
    kinds: dict[Any, int] = {}
    with Counting(built, _FEW[0]) as counting:
        found = [
            kinds.setdefault((kind, counting.masks_of(i), _local_window(built.skeleton, i)), len(kinds))
            for i, kind in enumerate(kind_of)
        ]
        places = [found.index(kind) for kind in range(len(kinds))]
        try:
            first = {layer: counting.run(layer) for layer in places}
        except TooManyOperationsError:
            raise
        except Exception:  # some accept whole blocks only
            first = {}
    runs = {layer: _Runs(seen, seen) for layer, seen in first.items()}
    runs |= _second(built, {layer: seen for layer, seen in first.items() if seen.has_products}, _FEW[1])
    blocks = [layer for layer in places if layer not in runs or runs[layer].has_blocks]
    try:
        if blocks:
            with Counting(built, _MORE[0]) as counting:
                first = {layer: counting.run(layer) for layer in blocks}
            runs |= _second(built, first, _MORE[1])
    except Exception:  # some hold tables of fewer positions
        if any(layer not in runs for layer in places):
            raise
    return places, found, [runs[layer] for layer in places]


def _second(built: Built, first: dict[int, Seen], length: int) -> dict[int, _Runs]:
    if not first:
        return {}
    with Counting(built, length) as counting:
        return {layer: _Runs(seen, counting.run(layer)) for layer, seen in first.items()}


def _local_window(skeleton: Skeleton, layer: int) -> int | None:
    """gpt_neo alone cuts its window out of a buffer, which has no values here."""
    config = skeleton.config
    if getattr(config, "model_type", "") == "gpt_neo" and config.attention_layers[layer] == "local":
        return int(config.window_size)
    return None


def _share_of_real_experts(skeleton: Skeleton) -> float:
    """longcat_flash alone has experts without arithmetic, which fake tensors cannot tell apart."""
    zero = int(getattr(skeleton.config, "zero_expert_num", 0) or 0)
    return skeleton.config.n_routed_experts / (skeleton.config.n_routed_experts + zero) if zero else 1.0


def _most_selected(built: Built, layer: int, runs: _Runs) -> int | None:
    """The most keys that a query attends to, if the layer selects them; else None."""
    both = zip(runs.short.choices, runs.long.choices, strict=False)
    growing = [i for i, (a, b) in enumerate(both) if a[0] < b[0]]
    if not growing:
        return None
    with Counting(built, _LONG, batch=1) as counting:
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
        if square:  # a mere selection looks at all keys
            limit = min([*runs.short.masks, *limits], default=(None, False)) if learned else ()
            pairs.append(Pairs(square, learned, *limit))
    return LayerFlops(visits, unlearned, round(states, 6), tuple(pairs))


def _growth(runs: _Runs, learned: bool) -> tuple[float, float]:
    """FLOPs of products of activations: (per token, per pair of tokens)."""
    short, long = runs
    square = short.between(learned, fused=True) / short.length
    if short is long:
        return 0.0, round(square, 6)
    low, high = (seen.between(learned, wide=True) for seen in runs)
    grown = (high - low) / (long.length - short.length)
    # A pass over all pairs of blocks is left out: states do not need it.
    times = long.length / short.length
    states = (times * short.between(learned) - long.between(learned)) / (times - 1)
    return states + low - grown * short.length, round(square + grown, 6)


def _visits(skeleton: Skeleton, layer: int, seen: Seen) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(how often each parameter multiplies a token, indices of those that no gradient reaches)."""
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
    for places in alike.values():  # experts are alike: which of them runs does not matter
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
    """An added parameter, such as a bias, follows what its module multiplies."""
    of_module: dict[str, list[float]] = {}
    for place in multiplied:
        module = _role(parameters[place].name).rpartition(".")[0]
        of_module.setdefault(module, []).append(visits[place])
    for place, parameter in enumerate(parameters):
        shares = of_module.get(_role(parameter.name).rpartition(".")[0], [])
        if place not in multiplied and shares and max(shares) < 1:
            visits[place] = max(shares)
