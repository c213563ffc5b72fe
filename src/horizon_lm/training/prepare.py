"""Plan a run before it starts: resolve its settings, read its data, count its steps; dry runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from horizon_lm.checkpoint.folder import Checkpoint, claim
from horizon_lm.config import TrainConfig
from horizon_lm.data import Loader, StreamLoader, TrainingData, load_training_data
from horizon_lm.data.detect import with_method
from horizon_lm.data.formats import KIND_WORDS
from horizon_lm.data.training_data import cache_dir
from horizon_lm.distributed.start import place
from horizon_lm.errors import ConfigError, DoesNotFitError, HorizonError, UnsupportedModelError
from horizon_lm.optim.curves import Curve, count_warmup_steps, learning_rates
from horizon_lm.plan.fleet import ONE, Fleet
from horizon_lm.plan.outline_cache import outline_cache
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.plan.show import describe
from horizon_lm.plan.step_size import CUT, rows_wanted
from horizon_lm.report.display import Progress
from horizon_lm.schedule import build_steps, check
from horizon_lm.training import describe as words_of
from horizon_lm.training.checks import check_sources
from horizon_lm.training.together import Together, shared
from horizon_lm.words import count, size

_FEW = 20  # steps: with fewer, a model learns little and the learning rate curve has no room


def with_method_of_data(config: TrainConfig, progress: Progress) -> TrainConfig:
    """Return the settings with the method that `auto` stands for, and say so if it is not sft.

    Looks at the first row of each dataset. Raises DataError, and ConfigError for settings of another method.
    """
    found = with_method(config)
    if config.method == "auto" and found.is_preference:
        progress.stage(f"method: {found.method}, since the data are {KIND_WORDS[found.data_kind]}")
    return found


def plan_and_read(
    config: TrainConfig, progress: Progress, cut: Mapping[str, int], together: Together
) -> tuple[TrainConfig, RunPlan | None, TrainingData]:
    """Return the resolved settings, the plan behind them, and the data.

    A run that does not fit is rejected before its data is tokenised, unless the data decides the size of a
    step (tokens_per_step=auto, or more than an epoch). cut: batch size and accumulation of the run that is
    resumed, fixed on any machine since the bits depend on them; empty for a new run. Of several ranks rank 0
    plans, and the others have no plan. Raises as `settle` and `load_training_data` do.
    """
    asked = config.tokens_per_step
    if cut:
        rows = cut[CUT[0]] * cut[CUT[1]]
        config = config.replace(**cut, tokens_per_step=rows * config.row_tokens)
        pinned = frozenset({*config.model_fields_set, *cut})
        config, plan = settle(config, progress, together, pinned=pinned)
        config = config.replace(tokens_per_step=asked)
        return config, plan, read_data(config, progress, together)
    data = None
    if asked != "auto":
        try:
            found, plan = settle(config, progress, together)
        except DoesNotFitError:
            fleet = Fleet.of_ranks(together.ranks)
            if not together.first("plan of the smallest step", lambda: _might_fit_less(config, fleet)):
                raise
            data = read_data(config, progress, together)
            if not _is_sized_by_data(config, data):
                raise
        else:
            data = read_data(found, progress, together)
            if not _is_sized_by_data(config, data):
                return found, plan, data
    data = read_data(config, progress, together) if data is None else data
    tokens = wanted_rows(config, data) * config.row_tokens
    progress.stage(f"tokens_per_step={asked}: {count(tokens, 'token')} a step for this data")
    found, plan = settle(config.replace(tokens_per_step=tokens), progress, together)
    data.loader.cut(found.per_device_train_batch_size, found.gradient_accumulation_steps)
    return found.replace(tokens_per_step=asked), plan, data


def read_data(config: TrainConfig, progress: Progress, together: Together) -> TrainingData:
    """Read and tokenise the data, and say what was read and left out.

    Rank 0 fills the cache of tokens, one rank of each node fills that of its node if it is another one, and
    all others find it. Raises DataError and ConfigError.
    """
    progress.stage("reading the data")
    is_cached = not config.streaming and cache_dir(config.dataset_cache_dir) is not None
    read = together.in_order if is_cached else together.each
    data = read("data", lambda: load_training_data(config))
    progress.stage(words_of.about_data(data))
    for text, is_warning in words_of.left_out(data):
        (progress.warn if is_warning else progress.stage)(text)
    return data


def check_share(config: TrainConfig, together: Together) -> None:
    """Raise ConfigError if a step has fewer micro-batches than there are ranks."""
    world, number = together.ranks.world, config.gradient_accumulation_steps
    if number >= world:
        return
    way = (
        f"set gradient_accumulation_steps={world} or a multiple of it, with a smaller "
        "per_device_train_batch_size if the step is to keep its size"
    )
    if config.tokens_per_step is not None and CUT[1] not in config.model_fields_set:
        way = "set a larger tokens_per_step"
    raise shared(
        ConfigError(
            f"a step has {count(number, 'micro-batch', 'micro-batches')} "
            f"(gradient_accumulation_steps={number}) for {world} ranks, which share them: "
            f"{world - number} would never have work",
            hint=f"{way}; or start fewer ranks",
        )
    )


def wanted_rows(config: TrainConfig, data: TrainingData) -> int:
    """Return the sequences of a step by `tokens_per_step`, which is not null."""
    sequences = None if isinstance(data.loader, StreamLoader) else len(data.rows)
    return rows_wanted(config, sequences, data.store.counts.is_text)


def _might_fit_less(config: TrainConfig, fleet: Fleet) -> bool:
    """Tell whether the smallest step would fit, so that reading the data is worthwhile."""
    if config.tokens_per_step is None or config.streaming:
        return False
    tokens = rows_wanted(config, 1, False) * config.row_tokens
    smallest = _planned(config.replace(tokens_per_step=tokens, skip_memory_check=True), fleet=fleet)
    return smallest.planner.fits(smallest.config)


def _is_sized_by_data(config: TrainConfig, data: TrainingData) -> bool:
    """Tell whether `tokens_per_step` is a number larger than an epoch."""
    tokens = config.tokens_per_step
    if not isinstance(tokens, int):
        return False
    return wanted_rows(config, data) != max(1, tokens // config.row_tokens)


def settle(
    config: TrainConfig,
    progress: Progress,
    together: Together,
    pinned: frozenset[str] | None = None,
) -> tuple[TrainConfig, RunPlan | None]:
    """Return the resolved settings and, on rank 0, the plan behind them.

    pinned: keys that stay as they are; by default those that the user set. A model that cannot be outlined
    without its weights runs as configured, with a warning; if it cannot be streamed, loading it says so.
    Raises ConfigError and DoesNotFitError.
    """
    own: list[tuple[TrainConfig, RunPlan | None]] = []

    def plan_here() -> dict[str, Any]:
        own.append(_settle(config, progress, pinned, Fleet.of_ranks(together.ranks)))
        before, after = config.to_dict(), own[0][0].to_dict()
        return {key: value for key, value in after.items() if value != before[key]}

    changes = together.first("plan", plan_here)
    return own[0] if own else (config.replace(**changes), None)


def _settle(
    config: TrainConfig, progress: Progress, pinned: frozenset[str] | None, fleet: Fleet
) -> tuple[TrainConfig, RunPlan | None]:
    try:
        plan = _planned(config, pinned, fleet, counted=True)
    except UnsupportedModelError as error:
        if config.tokens_per_step is not None:
            raise
        progress.warn(f"no plan: {error.message}")
        return config, None
    found = plan.prediction
    progress.stage(
        f"plan: {size(found.host_bytes)} of host memory"
        + (f", {size(found.device_bytes)} on the device" if found.device else "")
        + f"; {', '.join(_in_words(plan))}"
    )
    return plan.config, plan


def _planned(
    config: TrainConfig,
    pinned: frozenset[str] | None = None,
    fleet: Fleet = ONE,
    *,
    counted: bool = False,
) -> RunPlan:
    """Plan the run. counted: count the FLOPs of its layers, if possible."""
    with outline_cache(config) as cache:
        plan = plan_run(config, pinned=pinned, cache=cache, fleet=fleet)
        if counted:
            plan.planner.outline.count()
        return plan


def _in_words(plan: RunPlan) -> list[str]:
    shown = ("activations", "boundaries", "update", "reduction")
    return [
        f"{c.key} {' '.join(c.value) if isinstance(c.value, list) else c.value}"
        for c in plan.choices
        if c.key in shown
    ]


def dry_run(config: TrainConfig) -> str:
    """Plan a run, check the schedule of two consecutive steps and simulate one; return what to print.

    Nothing is trained and nothing stays on the disk. Under torchrun rank 0 plans for all ranks. Raises as
    `train` does before it starts.
    """
    here = place()
    fleet = Fleet(-(-here.world // here.local_world), here.local_world)
    with claim(config.output_dir, overwrite=config.overwrite_output_dir) as folder:
        check_sources(config, folder)
        plan = _planned(with_method(config), fleet=fleet)
    step = plan.prediction.plan
    ops = build_steps(step, 2)
    faults = check(ops, step)
    if faults:
        raise HorizonError(
            f"the schedule has a fault: {faults[0]}", hint="report this with the output of `horizon env`"
        )
    text = describe(plan, largest=False, timeline=True)
    return f"{text}\n{count(len(ops), 'op')} of two steps in a row were checked; nothing was trained"


# The number of steps.


def count_steps(config: TrainConfig, loader: Loader) -> int:
    """Return the steps from the beginning to the end of the run; the loader ends there too."""
    return loader.end_after(config.num_train_epochs, config.max_steps)


def count_on(loader: Loader, checkpoint: Checkpoint, step: int) -> None:
    """Count the coming steps from `step` if a resumed run has another step size, so that it trains the
    requested epochs."""
    then = math.prod(int(checkpoint.manifest.config[key]) for key in CUT)
    if loader.rows_per_step != then:
        loader.count_from(step)


def curve(config: TrainConfig, loader: Loader, num_steps: int) -> Curve:
    """Return the learning rate of each step. Raises ConfigError if it is 0 in all of them.

    A run that began under the rules of an earlier version keeps them.
    """
    return learning_rates(config, num_steps, as_before=loader.crosses_epochs)


def remarks(config: TrainConfig, data: TrainingData, num_steps: int, rates: Curve) -> list[str]:
    """Return warnings for a run of very few steps, or too few for its settings."""
    found = []
    sequences, size = len(data.rows), data.loader.rows_per_step
    by_epochs = config.max_steps < 1
    if config.is_preference and "learning_rate" not in config.model_fields_set:
        found.append(
            f"learning_rate={config.learning_rate:g} is the default of supervised tuning; preferences are "
            "usually trained on with less, 1e-6 in TRL"
        )
    elif config.has_adapter and "learning_rate" not in config.model_fields_set:
        found.append(
            f"learning_rate={config.learning_rate:g} is the default of training all parameters; adapters are "
            "usually trained with more, 1e-4 to 2e-4"
        )
    if isinstance(data.loader, StreamLoader) or data.loader.crosses_epochs:
        by_epochs = False
    elif isinstance(config.tokens_per_step, int) and config.tokens_per_step // config.row_tokens > sequences:
        found.append(
            f"tokens_per_step={config.tokens_per_step} is more than the data "
            f"({count(sequences, 'sequence')} of {config.row_tokens}): each step is one whole epoch"
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
