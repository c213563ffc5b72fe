"""The protocol of all systems: one configuration, one seed, one stream of random tokens without padding.

`build(case)` makes a system, which trains on the batches of `tokens_of`. Warm-up steps are not counted; the
median of the timed steps is reported with minimum and maximum. Warm up for at least two steps: a deferred
update first touches the moments' memory in the second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

import torch

from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import HorizonError


class AbsentError(HorizonError):
    """A system that cannot run here: its package, checkout or device is missing. A row, not a failure."""


@dataclass(frozen=True)
class Case:
    """One benchmark setting, the same for all systems.

    model: values of a transformers configuration, with model_type
    length, sequences: tokens per sequence, sequences per step
    rows: sequences per micro-batch; 0 lets the system choose
    clip: limit of the global gradient norm; None turns clipping off
    activations: recompute, keep, or auto (the system chooses)
    distinct: repeat the tokens every N steps; 0 never repeats them
    init: `transformers` draws weights as transformers does; `quick` takes no time or memory (models.py)
    cudnn_attention: False excludes cuDNN from torch's scaled_dot_product_attention
    extra: options of a single system
    """

    model: dict[str, Any]
    length: int = 512
    sequences: int = 1
    rows: int = 1
    device: str = "cpu"
    dtype: str = "bfloat16"
    clip: float | None = 1.0
    activations: str = "recompute"
    attention: str = "sdpa"
    cudnn_attention: bool = True
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: int = 2
    steps: int = 5
    seed: int = 0
    distinct: int = 0
    init: str = "transformers"
    threads: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens per step, none of them padding."""
        return self.sequences * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "betas": tuple(values["betas"])})

    def key(self, system: str) -> str:
        """Return an identifier of this case run by `system`."""
        text = json.dumps([system, self.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class System(Protocol):
    """A training system under test, made by `build(case)`, which raises AbsentError if it cannot run here."""

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        """Train on int64 ids, [rows, length] each, on the CPU; labels are the ids. Return the mean loss."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


def tokens_of(case: Case, step: int, rows: int) -> list[torch.Tensor]:
    """Return the ids of a step, [rows, length] for each micro-batch; the last may have fewer rows.

    Sequences and their order do not depend on `rows`.
    """
    number = step % case.distinct if case.distinct else step
    generator = torch.Generator().manual_seed(1_000_003 * (case.seed + 1) + number)
    size = (case.sequences, case.length)
    ids = torch.randint(0, int(case.model["vocab_size"]), size, generator=generator)
    return list(ids.split(rows or case.sequences))
