"""Learning-rate curves: transformers' own, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.machine.libraries import before_peft

Curve = Callable[[int], float]

_LOOKS = 50_000  # 0.1 s
_LARGEST = torch.finfo(torch.float32).max


def learning_rates(config: TrainConfig, num_steps: int, *, as_before: bool = False) -> Curve:
    """The learning rate of each step, counted from 0, of a run of `num_steps` steps.

    Transformers' `get_scheduler` makes the curve on an optimizer of one dummy parameter, so that
    every value is the one that its Trainer would use. A pure function of the step: a resumed run
    needs no state. Raises ConfigError for arguments that the curve refuses, for a rate that is negative or
    not finite at some step, and if the rate is 0 in every step. as_before: the warmup of versions before
    28 November 2026, which could fill the whole run, and no check for 0.
    """
    before_peft()
    from transformers import get_scheduler

    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            dummy,
            num_warmup_steps=count_warmup_steps(config.warmup_steps, num_steps, as_before=as_before),
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

    def curve(step: int) -> float:
        return config.learning_rate * factor(step)

    if not as_before and not any(curve(step) for step in range(num_steps)):
        raise _nothing_trained(config, num_steps)
    return curve


def _check_rates(rate: Callable[[int], float], num_steps: int) -> None:
    """Raise ValueError for a learning rate that is negative or that fp32 cannot hold, anywhere in the run.

    Looks at every step of a run of up to `_LOOKS` steps, and at as many of a longer one.
    """
    stride = max(1, num_steps // _LOOKS)
    for step in (*range(0, num_steps, stride), num_steps - 1):
        value = rate(step)
        if not 0 <= value <= _LARGEST:  # nor NaN
            raise ValueError(f"the learning rate of step {step + 1} is {value:g}")


def _nothing_trained(config: TrainConfig, num_steps: int) -> ConfigError:
    if not config.learning_rate:
        return ConfigError("learning_rate=0 would train nothing", hint="for example learning_rate=1e-5")
    return ConfigError(
        f"the learning rate is 0 in every step ({num_steps}): lr_scheduler_type={config.lr_scheduler_type!r} "
        f"with lr_scheduler_kwargs={config.lr_scheduler_kwargs} and warmup_steps={config.warmup_steps}; "
        "nothing would be trained",
        hint="change lr_scheduler_kwargs, or take lr_scheduler_type=cosine",
    )


def count_warmup_steps(warmup_steps: int | float, num_steps: int, *, as_before: bool = False) -> int:
    """Steps of warmup; a share of all steps (below 1) is rounded up, as transformers does.

    At most all but the last step, so that the peak is reached. as_before: without that limit.
    """
    steps = math.ceil(num_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
    return steps if as_before else min(steps, num_steps - 1)
