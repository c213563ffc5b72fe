"""What fits: the memory that a run may take, a predicted step compared with it, and the largest that fits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.arena import pinnable_bytes
from horizon_lm.memory.preflight import stating_hint, whole_memory
from horizon_lm.memory.ways import hint
from horizon_lm.plan.fleet import ONE, Fleet
from horizon_lm.plan.predict import Prediction
from horizon_lm.words import size

_GB = 1e9
Predictor = Callable[[TrainConfig], Prediction]
_MOST_LOOKS = 24  # of `largest_that_fits`; each may measure a model
# The rest of device memory is left to fragmentation and to kernels' workspaces: neither is predicted, and how
# much they take has not been measured on a GPU yet.
_DEVICE_SHARE = 0.95


@dataclass(frozen=True)
class Limits:
    """Bytes; None: unknown or unlimited. host: if `here`, beyond what the process holds now; else in all.
    ranks: processes of the run that share `host`."""

    host: int
    device: int | None = None
    pinned: int | None = None
    disk: int | None = None
    here: bool = False
    ranks: int = 1

    @classmethod
    def of_profile(cls, profile: Profile, stated: int | None = None) -> Limits:
        """stated: host bytes that replace the profile's."""
        device = None if profile.device == "cpu" else int(profile.device_bytes * _DEVICE_SHARE)
        return cls(int(profile.host_bytes) if stated is None else stated, device)

    @classmethod
    def of_this_machine(cls, device: str, folder: str, stated: int | None = None) -> Limits:
        """device: cpu or cuda[:N]. folder: the output folder, which need not exist yet. stated: host bytes of
        the machine, if the system reports too little."""
        free = None
        if device.startswith("cuda"):
            free = int(torch.cuda.mem_get_info(torch.device(device))[0] * _DEVICE_SHARE)
        place = Path(folder).expanduser().absolute()
        while not place.exists():
            place = place.parent
        pinned = pinnable_bytes() if device.startswith("cuda") else None
        return cls(available_host_bytes(stated), free, pinned, shutil.disk_usage(place).free, here=True)

    def of_fleet(self, fleet: Fleet, profile: Profile, stated: int | None = None) -> Limits:
        """Those of a node of a fleet of such machines. stated: as in `of_profile`, of each node."""
        if fleet == ONE:
            return self
        node = profile.as_node(fleet.gpus_per_node)
        is_own = self.here or stated is not None
        host = self.host if is_own else int(node.host_bytes)
        return replace(self, host=host, ranks=fleet.gpus_per_node)


@dataclass(frozen=True)
class Shortfall:
    """memory: host, device, locked or disk. All in bytes; of host memory what each of a node's ranks needs,
    and its share of what there is."""

    memory: str
    needed: int
    available: int

    @property
    def bytes(self) -> int:
        return self.needed - self.available


def export_bytes(config: TrainConfig, prediction: Prediction) -> int:
    """Disk bytes of the trained model, or of the adapter alone, plus a tenth."""
    size, units = (
        2 if (config.save_dtype or config.dtype) == "bfloat16" else 4,
        prediction.costs.outline.units,
    )
    weights = sum(unit.trainable_numel if config.has_adapter else unit.numel for unit in units)
    return int(weights * size * 1.1)


def shortfalls(config: TrainConfig, prediction: Prediction, limits: Limits) -> list[Shortfall]:
    """List what does not fit, worst first."""
    compared = _compare(config, prediction, limits)
    return sorted((s for s in compared if s.bytes > 0), key=lambda s: -s.bytes)


def rest_bytes(config: TrainConfig, prediction: Prediction, limits: Limits) -> dict[str, int]:
    """Bytes left of each memory; negative if it is too small."""
    return {s.memory: -s.bytes for s in _compare(config, prediction, limits)}


def room_bytes(config: TrainConfig, prediction: Prediction, limits: Limits) -> int:
    """Bytes left of the memory that has least left; negative if something does not fit."""
    return min(-s.bytes for s in _compare(config, prediction, limits))


def _compare(config: TrainConfig, prediction: Prediction, limits: Limits) -> list[Shortfall]:
    host = prediction.host_bytes - (prediction.host["process"] if limits.here else 0)
    room = (limits.host - int(config.reserve_host_gb * _GB)) // limits.ranks
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
    each = f" for each of {limits.ranks} ranks" if worst.memory == "host" and limits.ranks > 1 else ""
    is_ours = worst.memory == "host" and limits.here
    if is_ours:
        kept += f", of {whole_memory(config)}"
    also = "".join(f"; {s.memory} is short by {size(s.bytes)} too" for s in found[1:])
    place = "disk space" if worst.memory == "disk" else f"{worst.memory} memory"
    raise DoesNotFitError(
        f"{worst.memory} memory: a step needs {size(worst.needed)}{table}, and "
        f"{size(max(0, worst.available))} are there{each}{kept}: short by {size(worst.bytes)}{also}"
        if worst.memory != "disk"
        else f"disk: the trained model needs {size(worst.needed)} in {config.output_dir!r}, and "
        f"{size(worst.available)} are free: short by {size(worst.bytes)}{also}",
        hint=hint(config, shortages, f"free {size(worst.bytes)} of {place}, or use a smaller model")
        + (stating_hint(config) if is_ours else ""),
    )


def largest_that_fits(room_bytes: Callable[[int], int], start: int, most: int) -> int:
    """Find the largest number up to `most` that fits, to about 10 %; 0 if not even 1 does.

    room_bytes: bytes that a number leaves free; negative if it does not fit. It falls nearly linearly, so the
    next number to try is the zero of the line through the last two, alternating with bisection.
    """
    low, room = min(start, most), -1
    while low >= 1 and (room := room_bytes(low)) < 0:
        low //= 2
    if low < 1:
        return 0
    fits = [(low, room)]
    high: tuple[int, int] | None = None
    for look in range(_MOST_LOOKS):
        low = fits[-1][0]
        if low >= most or high is not None and high[0] - low <= max(1, low // 10):
            break
        number = min(most, _above(fits)) if high is None else _between(fits[-1], high, look)
        room = room_bytes(number)
        if room < 0:
            high = number, room
        else:
            fits.append((number, room))
    return fits[-1][0]


def _above(fits: list[tuple[int, int]]) -> int:
    """A little beyond the zero of the line through the last two; twice the last if there is one point."""
    last, room = fits[-1]
    if len(fits) == 1:
        return 2 * last
    before, more = fits[-2]
    each = (more - room) / (last - before)
    met = int((last + room / each) * 1.04) if each > 0 else 4 * last
    return max(last + 1, min(met, 16 * last))


def _between(low: tuple[int, int], high: tuple[int, int], look: int) -> int:
    """A little below the zero of the line; every other time the geometric mean."""
    met = 0.98 * (low[0] + low[1] / (low[1] - high[1]) * (high[0] - low[0]))
    number = math.sqrt(low[0] * high[0]) if look % 2 else met
    return min(high[0] - 1, max(low[0] + 1, int(number)))
