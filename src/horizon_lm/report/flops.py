"""What a step computes, and which part of the device's power that is (MFU).

Model FLOPs of a step = 6 N tokens + 6 L d sum(l²), with N the parameters that multiply a token, L layers of
attention of total head width d, and l the length of each piece of text that attends to itself. MFU = model
FLOPs / seconds / peak. Recomputation is not counted, nor is padding. What a layer really multiplies decides
(`plan.model_flops`), so that in general

- N counts a parameter as often as a token visits it: an expert for its share of the tokens, tables of which
  rows are looked up not at all, an embedding table only where the output layer shares it;
- L d is summed over the layers that have attention, with (d of queries and keys + d of values) / 2 where
  these differ;
- where a query sees w keys at most (a window, or keys that are selected for it), l² is w (2 l - w) for l > w;
  where it sees its chunk, the sum of the squared chunks;
- products of a state (linear attention, state spaces) are counted for each token as the model computes them.

A frozen parameter counts 4 in place of 6, as its own gradient is not computed, and 2 where nothing before
it is trained either, as no gradient passes there. So does what only selects (an indexer of sparse attention).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from horizon_lm.data.loader import StepSize
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.plan.model_flops import Counted, count_layers, kinds_of_layers
from horizon_lm.plan.working_set import Built

if TYPE_CHECKING:
    from horizon_lm.host_model import HostModel

FORMULA = (
    "(6 N tokens + 6 L d sum of squared lengths) / seconds / peak; N without the embedding table, experts by "
    "the tokens that visit them; L d over layers of attention, lengths within windows"
)


class Span(NamedTuple):
    """Attention of some layers. per_square: FLOPs, forward and backward, over l². most: keys that a query
    sees at most; in_chunks: those of its chunk."""

    per_square: float
    most: int | None = None
    in_chunks: bool = False

    def squares(self, lengths: np.ndarray) -> float:
        """Twice the pairs of query and key in pieces of these lengths."""
        if self.most is None:
            return float((lengths * lengths).sum())
        if self.in_chunks:
            whole, rest = lengths // self.most, lengths % self.most
            return float((whole * self.most**2 + rest * rest).sum())
        reach = np.minimum(lengths, self.most)
        return float((reach * (2 * lengths - reach)).sum())


@dataclass(frozen=True)
class ModelFlops:
    """per_token: 6 N, and states. spans: attention, by what limits it."""

    per_token: float
    spans: tuple[Span, ...]

    def of(self, size: StepSize) -> float:
        """FLOPs of a step, without recomputation."""
        lengths = np.array(size.lengths, dtype=np.float64)
        attention = sum(span.per_square * span.squares(lengths) for span in self.spans)
        return self.per_token * size.tokens + attention

    @property
    def per_square(self) -> float:
        """6 L d of attention without limits."""
        return sum(span.per_square for span in self.spans)


# Of a model that cannot be run without its weights.
UNKNOWN = ModelFlops(math.nan, ())


def flops_of(model: HostModel, counted: Counted | None = None) -> ModelFlops:
    """Of a model that is trained. counted: what is known of its layers; else they are run."""
    skeleton = model.skeleton
    if counted is None:
        try:
            counted = count_layers(Built(skeleton), kinds_of_layers(skeleton)[1])
        except Exception:  # whatever a model's code makes of tensors without values
            return UNKNOWN
    return model_flops(skeleton.units, counted, embedding_trainable=skeleton.embedding_trainable)


def model_flops(units: Sequence[UnitLayout], counted: Counted, *, embedding_trainable: bool) -> ModelFlops:
    """Of forward and backward. units: as in `Skeleton.units`; some may be frozen."""
    head = len(counted.kind_of) + 1
    trained = [u for u in range(head + 1) if units[u].trainable_numel]
    lowest = 0 if embedding_trainable else min(trained, default=head + 1)
    return _sum(units, counted, range(head + 1), lowest)


def forward_of_layers(units: Sequence[UnitLayout], counted: Counted) -> ModelFlops:
    """Of one forward pass through all layers: what recomputing them adds."""
    return _sum(units, counted, range(1, len(counted.kind_of) + 1), None)


def _sum(units: Sequence[UnitLayout], counted: Counted, which: range, lowest: int | None) -> ModelFlops:
    """lowest: the first unit through which a gradient passes; None for a forward pass alone."""
    per_token, spans = 0.0, dict[tuple[int | None, bool], float]()
    lookups, layers = set(counted.lookups), range(1, len(counted.kind_of) + 1)
    for u in which:
        passes = lowest is not None and u >= lowest
        layer = counted.layers[counted.kind_of[u - 1]] if u in layers else None
        for place, parameter in enumerate(units[u].parameters):
            if parameter.name in lookups:
                continue
            learns = passes and (layer is None or place not in layer.unlearned)
            factor = 2 + (2 + 2 * parameter.trainable if learns else 0)
            per_token += parameter.numel * (1.0 if layer is None else layer.visits[place]) * factor
        if layer is None:
            continue
        per_token += (3 if passes else 1) * layer.states
        for pairs in layer.pairs:
            key = pairs.most, pairs.in_chunks
            flops = pairs.flops / 2 * (3 if passes and pairs.learned else 1)
            spans[key] = spans.get(key, 0.0) + flops
    return ModelFlops(per_token, tuple(Span(flops, *key) for key, flops in spans.items()))


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: the best of a few, after one to warm up."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _settle(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _settle(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
