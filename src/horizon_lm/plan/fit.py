"""Compare a predicted step with a machine: what does not fit, by how much, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.memory.ways import hint
from horizon_lm.plan.limits import Limits
from horizon_lm.plan.predict import Prediction
from horizon_lm.words import size

_GB = 1e9
Predictor = Callable[[TrainConfig], Prediction]


@dataclass(frozen=True)
class Shortfall:
    """memory: host, device, locked or disk. All in bytes."""

    memory: str
    needed: int
    available: int

    @property
    def bytes(self) -> int:
        return self.needed - self.available


def export_bytes(config: TrainConfig, prediction: Prediction) -> int:
    """Disk that the trained model takes, and a tenth more."""
    size = 2 if (config.save_dtype or config.dtype) == "bfloat16" else 4
    weights = prediction.host["weights"] // (2 if config.dtype == "bfloat16" else 4)
    return int(weights * size * 1.1)


def shortfalls(config: TrainConfig, prediction: Prediction, limits: Limits) -> list[Shortfall]:
    """What does not fit, worst first."""
    compared = _compare(config, prediction, limits)
    return sorted((s for s in compared if s.bytes > 0), key=lambda s: -s.bytes)


def room_bytes(config: TrainConfig, prediction: Prediction, limits: Limits) -> int:
    """What is left of the memory that has least left; negative where something does not fit."""
    return min(-s.bytes for s in _compare(config, prediction, limits))


def _compare(config: TrainConfig, prediction: Prediction, limits: Limits) -> list[Shortfall]:
    host = prediction.host_bytes - (prediction.host["process"] if limits.here else 0)
    room = limits.host - int(config.reserve_host_gb * _GB)
    found = [Shortfall("host", host, room)]
    if limits.device is not None:
        found.append(Shortfall("device", prediction.device_bytes, limits.device))
    if limits.pinned is not None:
        found.append(Shortfall("locked", prediction.pinned_bytes, limits.pinned))
    if limits.disk is not None:
        found.append(Shortfall("disk", export_bytes(config, prediction), limits.disk))
    return found


def check(config: TrainConfig, prediction: Prediction, limits: Limits, predictor: Predictor) -> None:
    """Raise DoesNotFitError, with the figures and suggestions, if something does not fit.

    predictor: the prediction for other settings of the same model.
    """

    def shortages(other: TrainConfig) -> Mapping[str, int]:
        return {s.memory: s.bytes for s in _compare(other, predictor(other), limits)}

    found = shortfalls(config, prediction, limits)
    if not found:
        return
    worst = found[0]
    if worst.memory == "locked":
        raise DoesNotFitError(
            f"locked memory: a run pins {size(worst.needed)} for the device, and CUDA pins no more "
            f"than ulimit -l, {size(worst.available)}: short by {size(worst.bytes)}",
            hint="ulimit -l unlimited (docker run --ulimit memlock=-1; LimitMEMLOCK=infinity for a service)",
        )
    parts = prediction.host if worst.memory == "host" else prediction.device
    table = ""
    if worst.memory != "disk":
        rows = sorted(parts.items(), key=lambda row: -row[1])
        seen = (f"{name} {size(part)}" for name, part in rows if part >= worst.needed / 2000)
        table = f" ({', '.join(seen)})"
    kept = f" beside the {config.reserve_host_gb:g} GB of reserve_host_gb" if worst.memory == "host" else ""
    also = "".join(f"; {s.memory} is short by {size(s.bytes)} too" for s in found[1:])
    place = "disk space" if worst.memory == "disk" else f"{worst.memory} memory"
    raise DoesNotFitError(
        f"{worst.memory} memory: a step needs {size(worst.needed)}{table}, and "
        f"{size(max(0, worst.available))} are there{kept}: short by {size(worst.bytes)}{also}"
        if worst.memory != "disk"
        else f"disk: the trained model needs {size(worst.needed)} in {config.output_dir!r}, and "
        f"{size(worst.available)} are free: short by {size(worst.bytes)}{also}",
        hint=hint(config, shortages, f"free {size(worst.bytes)} of {place}, or use a smaller model"),
    )
