"""Learning-rate curves: transformers' own, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..config import TrainConfig
from ..errors import ConfigError

_LOOKS = 50_000  # 0.1 s
_LARGEST = torch.finfo(torch.float32).max


def learning_rates(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0, of a run of `num_steps` steps.

    Transformers' `get_scheduler` makes the curve on an optimizer of one dummy parameter, so that
    every value is the one that its Trainer would use. A pure function of the step: a resumed run
    needs no state. Raises ConfigError for arguments that the curve refuses, and for a
    rate that is negative or not finite at some step.
    """
    from transformers import get_scheduler

    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            dummy,
            num_warmup_steps=count_warmup_steps(config.warmup_steps, num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
        assert isinstance(scheduler, LambdaLR), config.lr_scheduler_type
        factor = scheduler.lr_lambdas[0]
        _check_rates(lambda step: config.learning_rate * factor(step), num_steps)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} with lr_scheduler_kwargs="
            f"{config.lr_scheduler_kwargs} and learning_rate={config.learning_rate:g} is refused: {error}",
            hint="the arguments are those of transformers' get_scheduler",
        ) from error
    return lambda step: config.learning_rate * factor(step)


def _check_rates(rate: Callable[[int], float], num_steps: int) -> None:
    """Raise ValueError for a learning rate that is negative or that fp32 cannot hold, anywhere in the run.

    Looks at every step of a run of up to `_LOOKS` steps, and at as many of a longer one.
    """
    stride = max(1, num_steps // _LOOKS)
    for step in (*range(0, num_steps, stride), num_steps - 1):
        value = rate(step)
        if not 0 <= value <= _LARGEST:  # nor NaN
            raise ValueError(f"the learning rate of step {step + 1} is {value:g}")


def count_warmup_steps(warmup_steps: int | float, num_steps: int) -> int:
    """Steps of warmup; a share of all steps (below 1) is rounded up, as transformers does."""
    return math.ceil(num_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
