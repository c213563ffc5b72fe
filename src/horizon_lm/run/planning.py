"""The plan of a run before it starts: choices made out, what cannot work refused, a dry run."""

from __future__ import annotations

from ..config import TrainConfig
from ..errors import HorizonError, UnsupportedModelError
from ..plan.run_plan import RunPlan, plan_run
from ..plan.show import describe
from ..schedule import build_steps, check
from ..words import count, size
from .folder import claim
from .progress import Progress


def settle(config: TrainConfig, progress: Progress) -> tuple[TrainConfig, RunPlan | None]:
    """The settings with what they left open made out, and the plan behind them.

    Raises ConfigError and DoesNotFitError. A model that cannot be outlined without its weights runs as
    configured, with a warning; if it cannot be streamed at all, loading it says so.
    """
    try:
        plan = plan_run(config)
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


def _in_words(plan: RunPlan) -> list[str]:
    shown = ("activations", "boundaries", "update")
    return [
        f"{c.key} {' '.join(c.value) if isinstance(c.value, list) else c.value}"
        for c in plan.choices
        if c.key in shown
    ]


def dry_run(config: TrainConfig) -> str:
    """Plan a run, build and check the schedule of two steps in a row, simulate one; nothing is trained and
    nothing stays on the disk. Returns what to print. Raises as `train` does before it starts."""
    from .train import check_sources

    with claim(config.output_dir, overwrite=config.overwrite_output_dir) as folder:
        check_sources(config, folder)
        plan = plan_run(config)
    step = plan.prediction.plan
    ops = build_steps(step, 2)
    faults = check(ops, step)
    if faults:
        raise HorizonError(
            f"the schedule has a fault: {faults[0]}", hint="please report it with `horizon env`"
        )
    text = describe(plan, largest=False, timeline=True)
    return f"{text}\n{count(len(ops), 'op')} of two steps in a row were checked; nothing was trained"
