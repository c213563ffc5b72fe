"""Whether a predicted step fits a machine; if not, by how much, and the cheapest ways out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, DoesNotFitError, UnsupportedModelError
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
    """Raises DoesNotFitError, with the figures and ways out, when something does not fit.

    predictor: the prediction for other settings of the same model.
    """
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
    raise DoesNotFitError(
        f"{worst.memory} memory: a step needs {size(worst.needed)}{table}, and "
        f"{size(max(0, worst.available))} are there{kept}: short by {size(worst.bytes)}{also}"
        if worst.memory != "disk"
        else f"disk: the trained model needs {size(worst.needed)} in {config.output_dir!r}, and "
        f"{size(worst.available)} are free: short by {size(worst.bytes)}{also}",
        hint=_hint(config, prediction, worst, predictor),
    )


def _hint(config: TrainConfig, prediction: Prediction, worst: Shortfall, predictor: Predictor) -> str:
    ways = list(_ways_out(config, prediction, worst, predictor))
    enough = [way for way in ways if way[1] >= worst.bytes]
    rest = sorted((way for way in ways if way[1] < worst.bytes), key=lambda way: -way[1])
    shown = (enough + rest)[:3]
    texts = [
        f"{name} saves {size(saved)}" + ("" if saved >= worst.bytes else " (not enough alone)")
        for name, saved in shown
    ]
    if len(texts) < 3:
        place = "disk space" if worst.memory == "disk" else f"{worst.memory} memory"
        texts.append(f"free {size(worst.bytes)} of {place}, or take a smaller model")
    return "; ".join(texts)


def _ways_out(
    config: TrainConfig, prediction: Prediction, worst: Shortfall, predictor: Predictor
) -> Iterator[tuple[str, int]]:
    """(settings, bytes saved), those first that cost least in speed, then in what is computed."""
    if worst.memory == "disk":
        if export_bytes(config, prediction) > (
            smaller := export_bytes(config.replace(save_dtype="bfloat16"), prediction)
        ):
            yield "save_dtype=bfloat16", worst.needed - smaller
        return
    for changes in _changes(config):
        try:
            other = predictor(config.replace(**changes))
        except (ConfigError, UnsupportedModelError):  # a way that this model does not have
            continue
        if worst.memory == "host":
            saved = prediction.host_bytes - other.host_bytes
        else:
            saved = prediction.device_bytes - other.device_bytes
        if saved > 0:
            yield (
                " ".join(f"{key}={'null' if value is None else value}" for key, value in changes.items()),
                saved,
            )


def _changes(config: TrainConfig) -> Iterator[dict]:
    """Cheapest first."""
    batch, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if config.slots > 2 or config.grad_slots > 2:
        yield {"slots": 2, "grad_slots": 2}
    if config.loss_chunk_tokens == "auto" or config.loss_chunk_tokens > 256:
        yield {"loss_chunk_tokens": 256}
    if config.activations not in ("auto", "recompute"):
        yield {"activations": "recompute"}
    if config.boundaries not in ("host",):
        yield {"boundaries": "host"}
    if batch > 1:
        yield {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": steps * 2}
    yield {"mlp_tile_tokens": max(1024, config.max_length // 8)}
    if config.moment_dtype == "float32":
        yield {"moment_dtype": "bfloat16"}
    if config.max_grad_norm and config.nonfinite == "raise" and config.update == "auto":
        yield {"max_grad_norm": None}
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if config.optim in ("adamw", "adam"):
        yield {"optim": "lion"}
    if config.max_length > 2:
        yield {"max_length": config.max_length // 2}
    if steps > 1:
        yield {"gradient_accumulation_steps": max(1, steps // 2)}
