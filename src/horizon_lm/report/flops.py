"""Model FLOPs of a step, and MFU: their share of the device's peak.

Model FLOPs of a step = 6 N tokens + 6 L d sum(l²): N parameters that multiply a token, L attention layers of
total head width d, l the length of each document or sequence that attends to itself. MFU = model FLOPs /
seconds / peak. Recomputation and padding are not counted. `plan.model_flops` measures what a layer
multiplies, so

- N counts a parameter once per visit of a token: an expert for its share of the tokens, lookup tables never,
  an embedding table only if the output layer shares it; of a vision-language model the language model alone,
  without the vision tower and the projector;
- L d sums over the layers with attention, as (d of queries and keys + d of values) / 2 if these differ;
- if a query sees at most w keys (a window, or selected keys), l² is w (2 l - w) for l > w; if it sees its
  chunk, the sum of the squared chunks;
- products of a state (linear attention, state spaces) count per token as the model computes them.

Documents that only run forward (KTO's KL term) count a third: 2 N tokens + 2 L d sum(l²).

A frozen parameter counts 4 instead of 6, because its own gradient is not computed, and 2 if no parameter
before it is trained, because no gradient passes. So does what only selects (an indexer of sparse attention).
Recomputation executes 2 more of each: 6 N for a frozen base under an adapter. A module of the base that the
adapter trains a copy of counts nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from horizon_lm.data.collate import StepSize
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.plan.model_flops import Counted, count_layers, kinds_of_layers
from horizon_lm.plan.working_set import Built

if TYPE_CHECKING:
    from horizon_lm.host_model import HostModel

FORMULA = (
    "(6 N tokens + 6 L d sum of squared lengths) / seconds / peak; N without the embedding table and the "
    "vision part, experts by the tokens that visit them; L d over layers of attention, lengths within windows"
)


class Span(NamedTuple):
    """Attention of some layers. per_square: forward and backward FLOPs / l². most: largest number of keys
    that a query sees; in_chunks: those of its chunk."""

    per_square: float
    most: int | None = None
    in_chunks: bool = False

    def squares(self, lengths: np.ndarray) -> float:
        """Return twice the number of query-key pairs in sequences of these lengths."""
        if self.most is None:
            return float((lengths * lengths).sum())
        if self.in_chunks:
            whole, rest = lengths // self.most, lengths % self.most
            return float((whole * self.most**2 + rest * rest).sum())
        reach = np.minimum(lengths, self.most)
        return float((reach * (2 * lengths - reach)).sum())


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model. per_token: 6 N, and states. spans: attention, by its limit. forward: of a forward
    pass alone, None if these are such."""

    per_token: float
    spans: tuple[Span, ...]
    forward: ModelFlops | None = None

    def of(self, size: StepSize) -> float:
        """Return the FLOPs of a step, without recomputation."""
        found = self._of(size.tokens, size.lengths)
        if size.forward_lengths and self.forward is not None:
            found += self.forward._of(sum(size.forward_lengths), size.forward_lengths)
        return found

    def _of(self, tokens: int, of_segments: Sequence[int]) -> float:
        lengths = np.array(of_segments, dtype=np.float64)
        attention = sum(span.per_square * span.squares(lengths) for span in self.spans)
        return self.per_token * tokens + attention

    @property
    def per_square(self) -> float:
        """6 L d of unlimited attention."""
        return sum(span.per_square for span in self.spans)


UNKNOWN = ModelFlops(math.nan, ())  # of a model that cannot run on fake tensors


def flops_of(model: HostModel, counted: Counted | None = None) -> ModelFlops:
    """Return the FLOPs of a model in training. counted: known counts of its layers; else they are run."""
    skeleton = model.skeleton
    if counted is None:
        try:
            counted = count_layers(Built(skeleton), kinds_of_layers(skeleton)[1])
        except Exception:  # a model's code may fail in any way on fake tensors
            return UNKNOWN
    return model_flops(skeleton.units, counted, embedding_trainable=skeleton.embedding_trainable)


def model_flops(units: Sequence[UnitLayout], counted: Counted, *, embedding_trainable: bool) -> ModelFlops:
    """Sum forward and backward FLOPs. units: as in `Skeleton.units`; some may be frozen."""
    head = len(counted.kind_of) + 1
    trained = [u for u in range(head + 1) if units[u].trainable_numel]
    lowest = 0 if embedding_trainable else min(trained, default=head + 1)
    forward = _sum(units, counted, range(head + 1), None)
    return replace(_sum(units, counted, range(head + 1), lowest), forward=forward)


def forward_of_layers(units: Sequence[UnitLayout], counted: Counted) -> ModelFlops:
    """Sum the FLOPs of one forward pass through all layers: the cost of recomputing them."""
    return _sum(units, counted, range(1, len(counted.kind_of) + 1), None)


def _sum(units: Sequence[UnitLayout], counted: Counted, which: range, lowest: int | None) -> ModelFlops:
    """Sum FLOPs over units. lowest: first unit that a gradient passes; None for a forward pass alone."""
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
    """Measure the FLOP/s of a large matrix product on this device: the best of six, or of half a second.

    The second factor is transposed, as in a linear layer: without AVX-512, a CPU multiplies bf16 ten times
    as slowly otherwise.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    while len(taken) < 6 and sum(taken) < 0.5:
        _settle(device)
        started = time.perf_counter()
        torch.mm(a, b.T)
        _settle(device)
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / min(taken)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
