"""The check before a run: what does not fit in host memory is refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from horizon_lm.config import ModelSettings
from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.memory import available_host_bytes, total_host_bytes
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.store import StoreSpec, predict_bytes
from horizon_lm.memory.ways import hint
from horizon_lm.words import size


def check_host_memory(
    units: Sequence[UnitLayout],
    settings: ModelSettings,
    spec_of: Callable[[ModelSettings], StoreSpec],
    *,
    available_bytes: int | None = None,
) -> None:
    """Raise DoesNotFitError if the store and `reserve_host_gb` exceed the memory that is available.

    spec_of: the store of these units under other settings. available_bytes: for tests; measured by default.
    """
    available = available_bytes
    if available is None:
        available = available_host_bytes(settings.host_memory_bytes)
    reserve = int(settings.reserve_host_gb * 1e9)

    def shortages(settings: ModelSettings) -> Mapping[str, int]:
        return {"host": sum(predict_bytes(units, spec_of(settings)).values()) + reserve - available}

    short = shortages(settings)["host"]
    if short <= 0:
        return
    parts = predict_bytes(units, spec_of(settings))
    table = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
    raise DoesNotFitError(
        f"the model needs {size(sum(parts.values()))} of host memory ({table}) and {size(reserve)} "
        f"are kept free (reserve_host_gb), but only {size(available)} are available of "
        f"{whole_memory(settings)}: short by {size(short)}",
        hint=hint(settings, shortages, f"free {size(short)} of memory, or use a smaller model")
        + stating_hint(settings),
    )


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
