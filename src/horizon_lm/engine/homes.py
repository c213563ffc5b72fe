"""Where units live: whole ones on the device, their trainable parts alone, or in host memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import torch

from horizon_lm.config.memory import TRAINABLE
from horizon_lm.config.model import ModelSettings
from horizon_lm.errors import ConfigError
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.packed import FORMATS
from horizon_lm.schedule.step_spec import EXACT
from horizon_lm.words import count

_DIGITS = re.compile(r"[0-9]+")
_NONE: frozenset[int] = frozenset()


class ModelShape(Protocol):
    """What resolving needs of a model: a `Skeleton`, or the planner's outline."""

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
    @property
    def has_adapter(self) -> bool: ...


@dataclass(frozen=True)
class Homes:
    """Units by where they live, as in `StepSpec`: those both uploaded and resident are split."""

    uploaded: frozenset[int] = _NONE
    resident: frozenset[int] = _NONE
    packed: frozenset[int] = _NONE

    @property
    def split(self) -> frozenset[int]:
        return self.uploaded & self.resident

    @classmethod
    def of(cls, settings: ModelSettings, shape: ModelShape, world: int = 1) -> Homes:
        """Resolve `resident` for a number of ranks.

        Of a unit with a packed part, `resident` means the rest: packed parts are always streamed. Raises
        ConfigError for units that the model does not have, and for trainable parts where ranks hold shares.
        """
        used, whole = used_units(shape), resident_units(settings, shape)
        packed = _packed(settings, shape, world)
        trainable = frozenset(u for u in used if shape.units[u].trainable_numel)
        parts = trainable if _splits(settings, shape, world) else _NONE
        resident = whole - (packed - trainable) | parts
        whole = frozenset(u for u in resident if u in whole or not shape.units[u].wide_offset)
        return cls(used - (whole - packed), resident, packed)


def packing_of(settings: ModelSettings) -> str:
    """The format of packed parts; "" without any. Raises ConfigError for a dtype that cannot be unpacked
    to."""
    if settings.base_dtype == "bfloat16" and settings.dtype == "float32":
        raise ConfigError(
            "base_dtype=bfloat16 is not supported with dtype=float32",
            hint="set dtype=bfloat16, whose masters are fp32, or leave base_dtype out",
        )
    return settings.base_dtype if settings.base_dtype in FORMATS else ""


def _packed(settings: ModelSettings, shape: ModelShape, world: int) -> frozenset[int]:
    """Units with a packed part. Raises ConfigError where there can be none."""
    packing = packing_of(settings)
    if not packing:
        return _NONE
    if reduction_of(settings, world):
        reason = f"{world:,} ranks" if world > 1 else "reduction=exact"
        raise ConfigError(
            f"base_dtype={packing} is not supported with {reason}",
            hint="leave base_dtype out: ranks share the host memory of a bfloat16 base",
        )
    found = frozenset(u for u in used_units(shape) if shape.units[u].packed_numel)
    if not found:
        raise ConfigError(
            f"base_dtype={packing} packs frozen linear weights of layers, and none are frozen",
            hint="set adapter=lora or freeze=[PATTERN], or leave base_dtype out",
        )
    return found


def _splits(settings: ModelSettings, shape: ModelShape, world: int) -> bool:
    """Whether the trainable parts of all units live on the device: if the settings say so, and with an
    adapter on a GPU, where they are small."""
    asked, shared = settings.resident, reduction_of(settings, world) != ""
    if asked == "auto":
        is_cuda = torch.cuda.is_available() if settings.device == "auto" else settings.device != "cpu"
        return is_cuda and shape.has_adapter and not shared
    says = asked == TRAINABLE or (isinstance(asked, list) and TRAINABLE in asked)
    if says and shared:
        reason = f"{world:,} ranks" if world > 1 else "reduction=exact"
        raise ConfigError(
            f"resident={TRAINABLE} is not supported with {reason}, which hold shares of whole units",
            hint="set resident=0, or the number of units that live on the device",
        )
    return says


def reduction_of(settings: ModelSettings, world: int) -> str:
    """Resolve `reduction` for a number of ranks; "" if one rank adds gradients where they are."""
    if world == 1:
        return EXACT if settings.reduction == EXACT else ""
    return EXACT if settings.reduction == "auto" else settings.reduction


def used_units(shape: ModelShape) -> frozenset[int]:
    """Units with weights that a step reads: not those that the model holds without using them."""
    units = {*range(shape.num_layers + 2), shape.embedding_unit}
    return frozenset(u for u in units if shape.units[u].numel)


def resident_order(shape: ModelShape) -> list[int]:
    """Return the units in the order in which they become resident: those whose update stands exposed before a
    step (embedding table, head, prologue), then layers from the first one up."""
    head, used = shape.num_layers + 1, used_units(shape)
    order = dict.fromkeys([shape.embedding_unit, head, *range(head)])
    return [unit for unit in order if unit in used]


def resident_units(settings: ModelSettings, shape: ModelShape) -> frozenset[int]:
    """Resolve what `resident` says of whole units; auto is none. Raises ConfigError for units that the model
    does not have."""
    order, asked = resident_order(shape), settings.resident
    if asked in ("auto", TRAINABLE):
        return frozenset()
    if isinstance(asked, int):
        if asked > len(order):
            raise ConfigError(
                f"resident={asked}, but the model has {count(len(order), 'unit')}",
                hint=f"set resident={len(order)} for all of them, or resident=0",
            )
        return frozenset(order[:asked])
    asked = [name for name in asked if name != TRAINABLE]
    # A tied embedding table is part of the head, so both names mean one unit.
    units = {"embedding": shape.embedding_unit} | {shape.units[unit].name: unit for unit in order}
    for i, name in enumerate(asked):
        if name not in units:
            near = _nearest(name, list(units))
            raise ConfigError(
                f"resident names {name!r}, which is not a unit of the model",
                hint=f"did you mean {near!r}?" if near else f"units are {_listed(list(units))}",
            )
        if name in asked[:i]:
            raise ConfigError(f"resident names {name!r} twice", hint="name each unit once")
    return frozenset(units[name] for name in asked)


def _nearest(name: str, units: list[str]) -> str | None:
    """Return the unit that `name` misspells, a layer only if the number is the same; else None."""
    number = _DIGITS.findall(name)
    near = get_close_matches(name, [unit for unit in units if _DIGITS.findall(unit) == number], 1)
    return near[0] if near else None


def _listed(names: list[str]) -> str:
    """List names, the layers by the first and the last."""
    layers = [name for name in names if name.startswith("layer ")]
    others = [name for name in names if name not in layers]
    return ", ".join([*others, *([f"{layers[0]} to {layers[-1]}"] if len(layers) > 1 else layers)])
