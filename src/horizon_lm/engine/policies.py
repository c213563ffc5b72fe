"""From settings and unit layouts to the plan of a step: the one way, of the engine and of the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from horizon_lm.config.model import ModelSettings, per_layer
from horizon_lm.engine.loss import chunk_tokens
from horizon_lm.errors import ConfigError
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.store import GradientSlabs, StoreSpec
from horizon_lm.optim.rules import ADAPTIVE_RULES
from horizon_lm.schedule import StepPlan

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ModelShape(Protocol):
    """What a plan needs to know of a model: a `Skeleton`, or what stands for one."""

    @property
    def units(self) -> Sequence[UnitLayout]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def embedding_unit(self) -> int: ...
    @property
    def embedding_trainable(self) -> bool: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def max_head_tokens(self) -> int: ...


@dataclass(frozen=True)
class Policies:
    """Settings, made out for one model.

    slots, grad_slots: as many as the settings and the blocks of layers ask for. loss_chunk: tokens.
    uploaded, trainable, kept, spilled: units.
    """

    settings: ModelSettings
    shape: ModelShape
    slots: int
    grad_slots: int
    loss_chunk: int
    uploaded: frozenset[int]
    trainable: frozenset[int]
    kept: frozenset[int]
    spilled: frozenset[int]

    @classmethod
    def of(cls, settings: ModelSettings, shape: ModelShape) -> Policies:
        """Raises ConfigError when a list of policies does not name each layer once."""
        # Layers of a block are on the device together, and the next block's first is on its way.
        block = settings.checkpoint_interval
        streamed = range(shape.num_layers + 2)
        kept, spilled = layer_policies(settings, shape.num_layers)
        return cls(
            settings,
            shape,
            slots=max(settings.slots, block + 1 if block > 1 else 2),
            grad_slots=max(settings.grad_slots, block),
            loss_chunk=min(chunk_tokens(settings.loss_chunk_tokens, shape.vocabulary), shape.max_head_tokens),
            uploaded=frozenset(u for u in streamed if shape.units[u].numel),
            trainable=frozenset(
                u for u in {*streamed, shape.embedding_unit} if shape.units[u].trainable_numel
            ),
            kept=kept,
            spilled=spilled,
        )

    def step_plan(
        self, micro_batches: int, *, evaluate: bool = False, saved: frozenset[int] = frozenset()
    ) -> StepPlan:
        """The plan of a step of so many micro-batches. saved: units that a checkpoint takes meanwhile."""
        return StepPlan(
            layers=self.shape.num_layers,
            uploaded=self.uploaded,
            trainable=self.trainable,
            embedding_unit=self.shape.embedding_unit,
            micro_batches=micro_batches,
            slots=self.slots,
            grad_slots=self.grad_slots,
            embedding_frozen=not self.shape.embedding_trainable,
            update=self.settings.update_mode,
            grad_slabs=self.settings.grad_slabs,
            kept=self.kept,
            checkpoint_interval=self.settings.checkpoint_interval,
            spilled=self.spilled,
            boundary_slots=self.settings.boundary_slots,
            evaluate=evaluate,
            saved=saved,
        )

    def gradient_dtype(self, unit: int, token_counts: Sequence[int], dtype: torch.dtype) -> torch.dtype:
        """In which a unit's gradient is collected: a store's own (`dtype`) when it is written once, fp32
        when it is added to. token_counts: tokens of each micro-batch."""
        return torch.float32 if self.adds_gradients(unit, token_counts) else dtype

    def adds_gradients(self, unit: int, token_counts: Sequence[int]) -> bool:
        """Whether a unit's gradient is a sum: over micro-batches, and in the head over chunks of the loss."""
        count = len(token_counts)
        chunks = max((-(-tokens // self.loss_chunk) for tokens in token_counts), default=1)
        return (count * max(1, chunks) if unit == self.shape.num_layers + 1 else count) > 1


def layer_policies(settings: ModelSettings, num_layers: int) -> tuple[frozenset[int], frozenset[int]]:
    """(units that keep their activations, units whose stored input is spilled to the host).

    Raises ConfigError when a list does not name each layer once.
    """
    kept = _chosen(settings.activations, ("recompute", "keep"), "activations", num_layers)
    spilled = _chosen(settings.boundaries, ("device", "host"), "boundaries", num_layers)
    return kept, spilled


def _chosen(value: str | list[str], words: tuple[str, str], key: str, num_layers: int) -> frozenset[int]:
    """Units (layer numbers from 1) for which the setting says `words[1]`."""
    listed = per_layer(value, words)
    if listed is None:
        listed = [value] * num_layers  # type: ignore[list-item]
    if len(listed) != num_layers:
        raise ConfigError(
            f"{key} names {len(listed)} layers, the model has {num_layers}",
            hint=f'for example {key}: ["{words[0]}*{num_layers}"]',
        )
    return frozenset(i + 1 for i, word in enumerate(listed) if word == words[1])


def store_spec(settings: ModelSettings, shape: ModelShape | None) -> StoreSpec:
    """What the store holds for each parameter; without the slabs of eager updates where the model is
    not known yet."""
    slabs = None
    if settings.update_mode == "eager":
        outer = frozenset() if shape is None else frozenset({shape.num_layers + 1, shape.embedding_unit})
        slabs = GradientSlabs(settings.grad_slabs if shape is not None else 0, outer)
    return StoreSpec(
        DTYPES[settings.dtype],
        moment_dtype=DTYPES[settings.moment_dtype],
        second_moment=settings.optim in ADAPTIVE_RULES,
        slabs=slabs,
    )
