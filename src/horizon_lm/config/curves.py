"""Learning-rate curves: their names and arguments, as in transformers' `get_scheduler`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from horizon_lm.config.base import fault

# Curve -> the arguments that it takes.
SCHEDULER_KWARGS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "inverse_sqrt": frozenset({"timescale"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"}),
    "warmup_stable_decay": frozenset(
        {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}
    ),
}
# Arguments that are the last learning rate of a curve, or its share of the peak.
_LOWEST_RATES = frozenset({"min_lr", "min_lr_rate", "min_lr_ratio", "lr_end"})
_CURVE_ALIASES = {"wsd": "warmup_stable_decay"}
# Unsupported curves of transformers: not functions of the step, so not bitwise resumable.
_NO_CURVES = {
    "reduce_lr_on_plateau": "it depends on evaluations, and a learning rate here depends on the step alone",
    "greedy": "it depends on losses, and a learning rate here depends on the step alone",
}


def curve_name(value: Any) -> Any:
    """Return the name of a curve without its alias. Raises the error of a curve that is not supported."""
    if isinstance(value, str) and value in _NO_CURVES:
        raise fault(
            f"lr_scheduler_type: {value} is not supported: {_NO_CURVES[value]}",
            key="lr_scheduler_type",
            hint="set lr_scheduler_type=cosine or lr_scheduler_type=warmup_stable_decay",
        )
    return _CURVE_ALIASES.get(value, value) if isinstance(value, str) else value


def curve_faults(name: str, given: Mapping[str, Any]) -> Iterator[PydanticCustomError]:
    """Yield an error for each argument in `given` that the curve lacks, needs or cannot have."""
    for key, value in given.items():
        if isinstance(value, (bool, dict, list)) or value is None:
            yield fault(
                f"lr_scheduler_kwargs.{key} is {value!r}, expected a number or text",
                key="lr_scheduler_kwargs",
                hint=f"for example lr_scheduler_kwargs.{key}=0.1",
            )
        if key in _LOWEST_RATES and isinstance(value, (int, float)) and value < 0:
            yield fault(
                f"lr_scheduler_kwargs.{key} is {value}, expected a number >= 0",
                key="lr_scheduler_kwargs",
                hint=f"for example lr_scheduler_kwargs.{key}=0",
            )
        if key not in SCHEDULER_KWARGS[name]:
            known = ", ".join(sorted(SCHEDULER_KWARGS[name])) or "no arguments"
            yield fault(
                f"lr_scheduler_kwargs: {name} has no argument '{key}'",
                key="lr_scheduler_kwargs",
                hint=f"{name} takes {known}",
            )
    if "min_lr" in SCHEDULER_KWARGS[name] and ("min_lr" in given) == ("min_lr_rate" in given):
        yield fault(
            f"{name} needs either min_lr or min_lr_rate",
            key="lr_scheduler_type",
            hint="for example lr_scheduler_kwargs.min_lr_rate=0.1",
        )
    if name == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield fault(
            "warmup_stable_decay needs num_decay_steps",
            key="lr_scheduler_type",
            hint="for example lr_scheduler_kwargs.num_decay_steps=100",
        )
