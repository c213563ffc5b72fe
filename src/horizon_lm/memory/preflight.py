"""The check before a run: what is too large for host or device memory is refused before it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from horizon_lm.config import ModelSettings
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.machine.device import free_memory_bytes
from horizon_lm.machine.memory import available_host_bytes, total_host_bytes
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.regions import StoreSpec, predict_bytes, predict_device_bytes
from horizon_lm.memory.ways import hint
from horizon_lm.words import size

_CPU = torch.device("cpu")
SpecOf = Callable[[ModelSettings], StoreSpec]


def check_memory(
    units: Sequence[UnitLayout],
    settings: ModelSettings,
    spec_of: SpecOf,
    *,
    device: torch.device = _CPU,
    slots_of: Callable[[ModelSettings], Mapping[str, int]] = lambda settings: {},
    available: Mapping[str, int] | None = None,
) -> None:
    """Raise DoesNotFitError if the store and `reserve_host_gb` exceed the host memory that is available, or
    resident units and slots the device memory. On the CPU both are host memory.

    spec_of: the rank's store of these units under other settings; slots_of: bytes of the slots. available:
    bytes of "host" and "device" that this rank may take; measured by default.
    """
    has_memory = device.type != "cpu"
    given = dict(available or {})
    if "host" not in given:
        given["host"] = available_host_bytes(settings.host_memory_bytes)
    if "device" not in given and has_memory:
        given["device"] = free_memory_bytes(device)
    reserve = int(settings.reserve_host_gb * 1e9)

    def parts_of(settings: ModelSettings) -> dict[str, dict[str, int]]:
        spec = spec_of(settings)
        host = predict_bytes(units, spec)
        device_parts = predict_device_bytes(units, spec) | dict(slots_of(settings))
        return {"host": host, "device": device_parts} if has_memory else {"host": host | device_parts}

    def shortages(settings: ModelSettings) -> Mapping[str, int]:
        free = given | {"host": given["host"] - reserve}
        return {memory: sum(part.values()) - free[memory] for memory, part in parts_of(settings).items()}

    short = shortages(settings)
    if max(short.values()) <= 0:
        return
    worst = max(short, key=lambda memory: short[memory])
    parts = parts_of(settings)[worst]
    world = spec_of(settings).shard.world
    who, more = ("the model", "") if world == 1 else (f"each of {world:,} ranks", "use more ranks, ")
    otherwise = f"free {size(short[worst])} of memory, {more}or use a smaller model"
    ways = _fitting_residents(settings, shortages, len(units)) if has_memory else ""
    ways += hint(settings, shortages, otherwise)
    needed = f"{who} needs {size(sum(parts.values()))} of {worst} memory ({_table(parts)})"
    free = f"only {size(given[worst])} are available"
    missing = f"short by {size(short[worst])}"
    if worst == "device":
        raise DoesNotFitError(f"{needed}, but {free} on {device}: {missing}", hint=ways)
    raise DoesNotFitError(
        f"{needed} and {size(reserve)} are kept free (reserve_host_gb), but {free} of "
        f"{whole_memory(settings)}: {missing}",
        hint=ways + stating_hint(settings),
    )


def _table(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)


def _fitting_residents(
    settings: ModelSettings, shortages: Callable[[ModelSettings], Mapping[str, int]], most: int
) -> str:
    """Return the start of a hint: the number of resident units closest to today's with which all fits; empty
    if there is none."""
    asked = settings.resident
    now = len(asked) if isinstance(asked, list) else 0 if isinstance(asked, str) else asked
    for number in sorted(range(most + 1), key=lambda number: abs(number - now)):
        with suppress(ConfigError):  # more than the model has
            if number != asked and max(shortages(settings.replace(resident=number)).values()) <= 0:
                return f"resident={number} fits; "
    return ""


def whole_memory(settings: ModelSettings) -> str:
    """Describe the machine's memory: as configured, or as the system reports it."""
    if settings.host_memory_bytes is not None:
        return f"the {size(settings.host_memory_bytes)} that host_memory_gb states"
    return f"the {size(total_host_bytes())} that the system shows"


def stating_hint(settings: ModelSettings) -> str:
    """Return the end of a hint: how to set the machine's memory; empty if it is set."""
    if settings.host_memory_bytes is not None:
        return ""
    return "; or state the machine's memory (host_memory_gb=NUMBER) if the system shows too little"
