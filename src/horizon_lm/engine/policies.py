"""Resolve settings for one model. Engine and planner both take step specs from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from horizon_lm.config.memory import ACTIVATIONS, BOUNDARIES, per_layer
from horizon_lm.config.model import ModelSettings
from horizon_lm.engine.homes import Homes, ModelShape, packing_of, reduction_of, used_units
from horizon_lm.engine.loss import chunk_tokens
from horizon_lm.errors import ConfigError
from horizon_lm.machine.cores import lane_cores
from horizon_lm.machine.device import free_memory_bytes, resolve_device
from horizon_lm.memory.layout import lay_out
from horizon_lm.memory.preflight import check_memory
from horizon_lm.memory.shards import WHOLE, Shard
from horizon_lm.memory.slots import gradient_slot_bytes, slot_bytes, weight_slot_numels
from horizon_lm.memory.store import GradientSlabs, StoreSpec
from horizon_lm.model.loading import count_parameters
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer, UpdateSettings, check_patterns, group_rule, segments
from horizon_lm.optim.rules import ADAPTIVE_RULES, finite_number
from horizon_lm.schedule import StepSpec
from horizon_lm.schedule.slots import gradient_slots_of
from horizon_lm.schedule.step_spec import ATTENTION, FAST, KEEP, PRODUCTS
from horizon_lm.words import count

_SUM_SLABS = 2  # one arrives while the host adds the other
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Policies:
    """Settings resolved for one model.

    slots, grad_slots: as settings and blocks of layers require. loss_chunk: tokens. rounds: the most in
    a step. sums: as in `StepSpec`. uploaded, trainable, attention, products, kept, spilled, resident, packed:
    units.
    world: number of ranks.
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
    attention: frozenset[int] = frozenset()
    products: frozenset[int] = frozenset()
    resident: frozenset[int] = frozenset()
    packed: frozenset[int] = frozenset()
    rounds: int = 1
    sums: str = ""
    world: int = 1

    @classmethod
    def of(
        cls, settings: ModelSettings, shape: ModelShape, device_bytes: int | None = None, world: int = 1
    ) -> Policies:
        """device_bytes: memory of the GPU, for `auto` settings without a plan. world: number of ranks.

        Raises ConfigError if a list of policies does not name each layer once, and for residents that the
        model does not have.
        """
        # All layers of a block are on the device together, while the next block's first is uploaded.
        block = settings.checkpoint_interval
        used = used_units(shape)
        homes = Homes.of(settings, shape, world)
        activations = _per_unit(settings.activations, ACTIVATIONS, "activations", shape.num_layers)
        boundaries = _per_unit(settings.boundaries, BOUNDARIES, "boundaries", shape.num_layers)
        reason = no_selection(settings)
        if reason is not None and {ATTENTION, PRODUCTS} & set(activations.values()):
            word = PRODUCTS if PRODUCTS in activations.values() else ATTENTION
            raise ConfigError(
                f"activations={word} is not supported with {reason}",
                hint="set activations to keep or recompute",
            )
        return cls(
            settings,
            shape,
            slots=max(settings.slots, block + 1 if block > 1 else 2),
            grad_slots=max(settings.grad_slots, block),
            loss_chunk=min(
                chunk_tokens(settings.loss_chunk_tokens, shape.vocabulary, device_bytes),
                shape.max_head_tokens,
            ),
            uploaded=homes.uploaded,
            trainable=frozenset(u for u in used if shape.units[u].trainable_numel),
            kept=_set_to(KEEP, activations),
            spilled=_set_to("host", boundaries),
            attention=_set_to(ATTENTION, activations),
            products=_set_to(PRODUCTS, activations),
            resident=homes.resident,
            packed=homes.packed,
            rounds=_rounds(settings),
            sums=_sums(settings),
            world=world,
        )

    @property
    def reduction(self) -> str:
        """How gradients of ranks are added; "" if one rank adds them where they are."""
        return reduction_of(self.settings, self.world)

    def step_spec(
        self, micro_batches: int, *, evaluate: bool = False, saved: frozenset[int] = frozenset()
    ) -> StepSpec:
        """The spec of a step of N micro-batches of each rank. saved: units written to a checkpoint meanwhile.

        Raises ConfigError for rounds of several micro-batches whose gradients the host is to add up.
        """
        of_round = micro_batches if evaluate else -(-micro_batches // self.rounds)
        rounds = -(-micro_batches // of_round)
        if rounds > 1 and of_round > 1 and self.sums == "add" and not self.reduction:
            raise ConfigError(
                f"round_sums=add needs one micro-batch per round, but rounds={self.rounds} cuts "
                f"{count(micro_batches, 'micro-batch', 'micro-batches')} into rounds of {of_round}",
                hint=f"set rounds={micro_batches} or round_sums=host",
            )
        return StepSpec(
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
            resident=self.resident,
            packed=self.packed,
            rounds=rounds,
            sums=self.sums,
            attention=self.attention,
            products=self.products,
            world=self.world,
            reduction=self.reduction,
        )

    def gradient_dtype(self, unit: int, token_counts: Sequence[int], dtype: torch.dtype) -> torch.dtype:
        """In which dtype a unit's gradient accumulates: the store's (`dtype`) if written once, fp32 if added
        to. token_counts: tokens of each micro-batch."""
        return torch.float32 if self.adds_gradients(unit, token_counts) else dtype

    def contribution_dtype(
        self, unit: int, token_counts: Sequence[int], dtype: torch.dtype, *, adds_in_fp32: bool
    ) -> torch.dtype:
        """In which dtype ranks send a unit's gradient for each other to add: the narrowest that holds what
        one rank alone would add. That is the store's (`dtype`), unless a parameter is computed in fp32, the
        head's gradient is itself a sum (over loss chunks), or its products end in fp32 (`adds_in_fp32`).
        Sums over micro-batches (`reduction: fast`) are fp32. token_counts: as in `gradient_dtype`."""
        is_wide = any(p.compute_dtype != dtype for p in self.shape.units[unit].trainable)
        if is_wide or self.reduction == FAST:
            return torch.float32
        is_sum = unit == self.shape.num_layers + 1 and (
            adds_in_fp32
            and self.adds_gradients(unit, token_counts)
            or any(self.adds_gradients(unit, [tokens]) for tokens in token_counts)
        )
        return torch.float32 if is_sum else dtype

    def adds_gradients(self, unit: int, token_counts: Sequence[int]) -> bool:
        """Whether a unit's gradient is a sum over micro-batches or, in the head, over loss chunks. An
        embedding unit's gradient is not: its rows are summed first."""
        count, head = len(token_counts), self.shape.num_layers + 1
        chunks = max((-(-tokens // self.loss_chunk) for tokens in token_counts), default=1)
        return unit <= head and (count * max(1, chunks) if unit == head else count) > 1

    def cpu_slot_bytes(
        self, spec: StepSpec, token_counts: Sequence[int], dtype: torch.dtype
    ) -> dict[str, int]:
        """Predict the bytes of slots that a step takes on the CPU. Only packed weights and gradients need
        them: those wider than the store's (`dtype`), and those that cannot accumulate in it."""
        apart = {
            unit
            for unit in spec.trainable
            if spec.accumulates_in_slot(unit) or self.gradient_dtype(unit, token_counts, dtype) != dtype
        }
        used = gradient_slots_of(spec, apart) if apart else ()
        found = gradient_slot_bytes(self.shape.units, spec, used)
        if spec.packed:
            numels = weight_slot_numels(self.shape.units, spec, alias=True)
            found["weight_slots"] = sum(numels) * dtype.itemsize
        return found


def no_selection(settings: ModelSettings) -> str | None:
    """The setting for which no layer can keep only its products or attention; None if there is none.

    A compiled layer saves what its compiler chose. Kernels of other packages may write into the output of a
    product (liger's rotary embedding does), which no dispatch mode sees.
    """
    if settings.compile:
        return f"compile={str(settings.compile).lower()}"
    if settings.kernels != "none":
        return f"kernels={settings.kernels}"
    return "attn_implementation=flex_attention" if settings.attn_implementation == "flex_attention" else None


def _per_unit(value: str | list[str], words: Sequence[str], key: str, num_layers: int) -> dict[int, str]:
    """Return the word of each layer by unit. Raises ConfigError if a list does not name each layer once."""
    listed = per_layer(value, words)
    if listed is None:
        listed = [value] * num_layers  # type: ignore[list-item]
    if len(listed) != num_layers:
        raise ConfigError(
            f"{key} names {len(listed)} layers, the model has {num_layers}",
            hint=f'for example {key}: ["{words[0]}*{num_layers}"]',
        )
    return {i + 1: word for i, word in enumerate(listed)}


def _set_to(word: str, words: dict[int, str]) -> frozenset[int]:
    return frozenset(unit for unit, found in words.items() if found == word)


def _rounds(settings: ModelSettings) -> int:
    return 1 if settings.rounds == "auto" else settings.rounds


def _sums(settings: ModelSettings) -> str:
    """Where unfinished gradients wait between rounds; "" without rounds."""
    if _rounds(settings) == 1:
        return ""
    if settings.round_sums != "auto":
        return settings.round_sums
    is_cuda = torch.cuda.is_available() if settings.device == "auto" else settings.device != "cpu"
    return "host" if is_cuda else "device"


def store_spec(settings: ModelSettings, shape: ModelShape | None, shard: Shard = WHOLE) -> StoreSpec:
    """What a rank's store holds per parameter; if the model is unknown, without residents, the slabs of eager
    updates, and sums between rounds."""
    slabs = None
    if settings.update_mode == "eager":
        outer = frozenset() if shape is None else frozenset({shape.num_layers + 1, shape.embedding_unit})
        slabs = GradientSlabs(settings.grad_slabs if shape is not None else 0, outer)
    homes = Homes()
    sums: frozenset[int] = frozenset()
    if shape is not None:
        homes = Homes.of(settings, shape, shard.world)
        if _sums(settings) in ("host", "add"):
            below_head = used_units(shape) & frozenset(range(shape.num_layers + 1))
            sums = frozenset(u for u in below_head if shape.units[u].trainable_numel)
    adds = _sums(settings) == "add" and not reduction_of(settings, shard.world)
    return StoreSpec(
        DTYPES[settings.dtype],
        moment_dtype=DTYPES[settings.moment_dtype],
        second_moment=settings.optim in ADAPTIVE_RULES,
        slabs=slabs,
        resident=homes.resident,
        split=homes.split,
        packing=packing_of(settings) if homes.packed else "",
        sums=sums,
        sum_slabs=_SUM_SLABS if sums and adds else 0,
        shard=shard,
    )


def slots_of(
    settings: ModelSettings, shape: ModelShape, device: torch.device, world: int = 1
) -> dict[str, int]:
    """Predict the bytes of a rank's weight and gradient slots; of one rank on the CPU, unless its steps are
    shared, those that steps of several micro-batches take."""
    policies, dtype = Policies.of(settings, shape, world=world), DTYPES[settings.dtype]
    if device.type != "cpu" or policies.reduction:
        spec = policies.step_spec(policies.rounds)
        packing = packing_of(settings)
        return slot_bytes(shape.units, spec, dtype, stages=device.type != "cpu", packing=packing)
    count = max(2, policies.rounds)
    return policies.cpu_slot_bytes(policies.step_spec(count), [1] * count, dtype)


def make_optimizer(
    skeleton: Skeleton, settings: ModelSettings, device: torch.device, core_sharers: int = 1
) -> Optimizer:
    """Build the optimizer that the settings describe.

    Raises ConfigError for a pattern of lr_factors that matches nothing.
    """
    trainable = [p.name for unit in skeleton.units for p in unit.trainable]
    check_patterns(settings.lr_factors, trainable)
    rule = group_rule(
        settings.lr_factors,
        decay_embeddings=settings.decay_embeddings,
        is_embedding=skeleton.is_embedding,
        is_norm=skeleton.is_norm,
    )
    optimizer = Optimizer(
        settings.optim,
        settings.adam_beta1,
        settings.adam_beta2,
        settings.adam_epsilon,
        settings.sgd_momentum,
        settings.seed,
        tuple(segments(unit, rule) for unit in skeleton.units),
        None if settings.optimizer_threads == "auto" else settings.optimizer_threads,
        lane_cores(device.type, settings.update_mode),
        core_sharers,
    )
    optimizer.check(UpdateSettings(1, 0.0, None, 0.0))
    return optimizer


def check_fits_host(
    values: dict[str, Any], settings: ModelSettings, available_bytes: int, shard: Shard = WHOLE
) -> None:
    """Raise DoesNotFitError unless a rank's store of a model of this transformers configuration fits."""
    dtype = DTYPES[settings.dtype]
    trained, frozen = count_parameters(values, settings)
    rows = [("trained", (trained,), True, dtype), ("frozen", (frozen,), False, dtype)]
    # Left out, since layers are not known yet: slabs, slots, and where resident units lie.
    device = resolve_device(settings.device)
    if settings.resident not in ("auto", 0, []) and device.type != "cpu":
        available_bytes += free_memory_bytes(device)
    units = [lay_out("all", rows, dtype)]
    check_memory(
        units, settings, lambda other: store_spec(other, None, shard), available={"host": available_bytes}
    )


def update_settings(
    where: str, settings: ModelSettings, step: int, lr: Any, max_grad_norm: Any, weight_decay: Any
) -> UpdateSettings:
    """Check the numbers of an update before anything is computed. where: the call, for errors."""
    lr = finite_number(where, "lr", lr, hint="lr=1e-5 is a usual learning rate")
    weight_decay = finite_number(where, "weight_decay", weight_decay, hint="weight_decay=0 turns it off")
    limit = max_grad_norm
    if isinstance(limit, float) and limit == math.inf:
        limit = None  # as in torch.nn.utils.clip_grad_norm_
    if limit is not None:
        hint = "max_grad_norm=None turns clipping off, 1.0 is a usual limit"
        limit = finite_number(where, "max_grad_norm", limit, hint=hint)
    if limit and settings.update_mode == "eager":
        raise ConfigError(
            f"max_grad_norm={limit} with update: eager, which updates layers before the norm is known",
            hint="update='deferred' clips exactly, and overlaps the updates with the next forward pass",
        )
    return UpdateSettings(step, lr, limit, weight_decay)
