"""The optimizer steps of a run: how many there are, whether they can train, and remarks on them."""

from __future__ import annotations

import math

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader, StreamLoader, TrainingData
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.optim.curves import Curve, count_warmup_steps, learning_rates
from horizon_lm.plan.step_size import CUT
from horizon_lm.words import count

_FEW = 20  # steps in which a model learns little, and the curve of the learning rate has no room


def count_steps(config: TrainConfig, loader: Loader) -> int:
    """Steps from the beginning to the end of the run. The loader ends there too."""
    return loader.end_after(config.num_train_epochs, config.max_steps)


def count_on(loader: Loader, checkpoint: Checkpoint, step: int) -> None:
    """Where a run goes on after `step` with steps of another size, count those to come from here, so that the
    epochs asked are those trained."""
    then = math.prod(int(checkpoint.manifest.config[key]) for key in CUT)
    if loader.rows_per_step != then:
        loader.count_from(step)


def curve(config: TrainConfig, loader: Loader, num_steps: int) -> Curve:
    """The learning rate of each step. Raises ConfigError if it is 0 in all of them; a run that began under
    the rules of earlier versions goes on with its own."""
    return learning_rates(config, num_steps, as_before=loader.crosses_epochs)


def check_factors(config: TrainConfig, model: HostModel) -> None:
    """Raises ConfigError if `lr_factors` leaves no parameter to train."""
    factors = [s.group.lr_factor for unit in model.engine.optimizer.segments for s in unit]
    if factors and not any(factors):
        raise ConfigError(
            f"lr_factors={config.lr_factors} makes the learning rate of every parameter 0: nothing would be "
            "trained",
            hint="give at least one parameter a factor above 0",
        )


def remarks(config: TrainConfig, data: TrainingData, num_steps: int, rates: Curve) -> list[str]:
    """What to know of a run of so few steps, or whose settings have no room in it."""
    found = []
    sequences, size = len(data.rows), data.loader.rows_per_step
    by_epochs = config.max_steps < 1
    if isinstance(data.loader, StreamLoader) or data.loader.crosses_epochs:
        by_epochs = False
    elif isinstance(config.tokens_per_step, int) and config.tokens_per_step // config.max_length > sequences:
        found.append(
            f"tokens_per_step={config.tokens_per_step} is more than the data "
            f"({count(sequences, 'sequence')} of {config.max_length}): each step is one whole epoch"
        )
    elif size > sequences:
        found.append(
            f"a step of {count(size, 'sequence')} is larger than the data ({count(sequences, 'sequence')}): "
            "each step is one whole epoch"
        )
    if by_epochs and num_steps < _FEW:
        more = "a larger num_train_epochs makes more"
        if size > 1 and config.tokens_per_step is not None:
            more = "a smaller tokens_per_step, or a larger num_train_epochs, makes more"
        elif size > 1:
            more = (
                "smaller per_device_train_batch_size x gradient_accumulation_steps, or a larger "
                "num_train_epochs, make more"
            )
        found.append(
            f"the run has only {count(num_steps, 'optimizer step')}: {count(sequences, 'sequence')}, up to "
            f"{size:,} a step, num_train_epochs={config.num_train_epochs:g}; {more}"
        )
    wanted = count_warmup_steps(config.warmup_steps, num_steps, as_before=True)
    used = count_warmup_steps(config.warmup_steps, num_steps, as_before=data.loader.crosses_epochs)
    if used < wanted and config.warmup_steps >= 1:
        found.append(
            f"warmup_steps={config.warmup_steps} is too long for a run of "
            f"{count(num_steps, 'step')}: {used:,} used, so that learning_rate is reached"
        )
    if config.lr_scheduler_type == "warmup_stable_decay":
        highest = max(rates(step) for step in range(num_steps))
        if highest < config.learning_rate:
            found.append(
                f"warmup_steps={config.warmup_steps} and num_decay_steps="
                f"{config.lr_scheduler_kwargs['num_decay_steps']} together are more than "
                f"{count(num_steps, 'step')}: the learning rate only reaches {highest:.2e} of "
                f"{config.learning_rate:.2e}"
            )
    return found
