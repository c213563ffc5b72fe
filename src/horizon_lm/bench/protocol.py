"""What every system runs: the same configuration and seed, the same random tokens, no padding.

A system is made by `build(case)` and trains on the batches of `tokens_of`. Warm-up steps are not counted;
of the timed ones the median is reported, with the least and the most. Two warm-up steps are the least: an
update that is put off to the next step touches the moments' memory for the first time in the second one.
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
    """A system that cannot run here: its package, its checkout or its device is missing. A row, no fault."""


@dataclass(frozen=True)
class Case:
    """One setting, the same for all systems.

    model: values of a transformers configuration, with model_type. sequences: of a step, each of `length`
    tokens. rows: sequences of a micro-batch; 0 leaves the cut to the system. clip: global norm, None for
    off. activations: recompute, keep, or auto, which leaves it to the system. distinct: the tokens of a step
    come round again after so many steps; 0 for never. init: `transformers` draws weights as transformers
    does; `quick` takes no time and no memory (models.py). extra: what only one system knows.
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
        """Of a step. None is padding."""
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
        """Names a job: the same system and case have the same key."""
        text = json.dumps([system, self.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class System(Protocol):
    """What is measured. Made by `build(case)`, which raises AbsentError where it cannot run."""

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        """Train on int64 ids, [rows, length] each and on the CPU; the mean loss. Labels are the ids."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


def tokens_of(case: Case, step: int, rows: int) -> list[torch.Tensor]:
    """The ids of a step, [rows, length] for each micro-batch (the last may have fewer rows): the same
    sequences in the same order however they are cut."""
    number = step % case.distinct if case.distinct else step
    generator = torch.Generator().manual_seed(1_000_003 * (case.seed + 1) + number)
    size = (case.sequences, case.length)
    ids = torch.randint(0, int(case.model["vocab_size"]), size, generator=generator)
    return list(ids.split(rows or case.sequences))
