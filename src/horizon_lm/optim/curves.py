"""Learning-rate curves: transformers' own, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..config import TrainConfig
from ..errors import ConfigError


def learning_rates(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0, of a run of `num_steps` steps.

    Transformers' `get_scheduler` makes the curve on an optimizer of one dummy parameter, so that
    every value is the one that its Trainer would use. A pure function of the step: a resumed run
    needs no state. Raises ConfigError for arguments that the curve refuses.
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
        for step in range(num_steps):
            rate = config.learning_rate * factor(step)
            if not isinstance(rate, float | int) or not 0 <= rate < math.inf:
                raise ValueError(f"the rate of step {step + 1} is {rate}")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} with lr_scheduler_kwargs="
            f"{config.lr_scheduler_kwargs} and learning_rate={config.learning_rate:g} is refused: {error}",
            hint="the arguments are those of transformers' get_scheduler",
        ) from error
    return lambda step: config.learning_rate * factor(step)


def count_warmup_steps(warmup_steps: int | float, num_steps: int) -> int:
    """Steps of warmup; a share of all steps (below 1) is rounded up, as transformers does."""
    return math.ceil(num_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
