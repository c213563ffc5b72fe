"""Reject, with figures, what does not fit in host memory, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.memory.store import StoreSpec, predict_bytes
from horizon_lm.words import size


def check_host_memory(
    units: Sequence[UnitLayout], spec: StoreSpec, *, reserve_bytes: int, available_bytes: int | None = None
) -> None:
    """Raise DoesNotFitError if the store exceeds the available host memory.

    reserve_bytes: left to the rest of the machine. available_bytes: measured by default.
    """
    parts = predict_bytes(units, spec)
    needed = sum(parts.values())
    available = available_host_bytes() if available_bytes is None else available_bytes
    short = needed + reserve_bytes - available
    if short <= 0:
        return
    table = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
    ways = {
        "dtype: bfloat16": replace(spec, dtype=torch.bfloat16),
        "moment_dtype: bfloat16": replace(spec, moment_dtype=torch.bfloat16),
    }
    hints = []
    for way, smaller in ways.items():
        saved = needed - sum(predict_bytes(units, smaller).values())
        if saved > 0:
            hints.append(f"{way} saves {size(saved)}")
    hints += [f"free {size(short)} of memory", "choose a smaller model"]
    raise DoesNotFitError(
        f"the model needs {size(needed)} of host memory ({table}) and {size(reserve_bytes)} "
        f"are kept free (reserve_host_gb), but only {size(available)} are available: "
        f"short by {size(short)}",
        hint="; ".join(hints),
    )
