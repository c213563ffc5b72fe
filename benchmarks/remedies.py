"""Simulated gains from remedies for a run that its host or bus limits.

`state in idle device memory`: weights, gradients and optimizer state of as many units as fit stay in the
device memory that the plan leaves free. Such a unit never crosses the bus, and its update runs at the
device's memory rate instead of the host's; everything else is the engine's schedule with the planner's
costs. The engine cannot do this: the figure says what it would be worth.
"""

from __future__ import annotations

from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.errors import HorizonError
from horizon_lm.memory.store import predict_bytes
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.plan.steps import schedule_of
from horizon_lm.schedule import Op, simulate

HEAD = ["run", "profile", "remedy", "tokens/s, SIMULATED", "over as it was, SIMULATED"]
IDLE = "state in idle device memory"


def rows(name: str, case: Case, hardware: str = "auto") -> list[list[str]]:
    """Return a row of HEAD for each remedy; `-` if it does not fit or fits nothing more."""
    cache = OutlineCache()  # no remedy changes the model
    as_it_was = _plan(case, hardware, cache)
    found: dict[str, float | None] = {"as it was": _rate(as_it_was)}
    found["bf16 moments"] = _rate(
        _plan(case.replace(extra=case.extra | {"moment_dtype": "bfloat16"}), hardware, cache)
    )
    twice = case.replace(sequences=2 * case.sequences)
    found["twice the tokens a step"] = _rate(_plan(twice, hardware, cache))
    resident = resident_units(as_it_was) if as_it_was else frozenset()
    count = f" ({len(resident)} of {len(as_it_was.prediction.plan.trainable)} units)" if as_it_was else ""
    found[IDLE + count] = tokens_per_second(as_it_was, resident) if as_it_was and resident else None
    base = found["as it was"]
    profile = as_it_was.profile.name if as_it_was else ""
    return [
        [
            name,
            profile,
            remedy,
            f"{rate:,.0f}" if rate else "-",
            f"{rate / base:.3f}" if rate and base else "-",
        ]
        for remedy, rate in found.items()
    ]


def _plan(case: Case, hardware: str, cache: OutlineCache) -> RunPlan | None:
    try:
        return plan_run(train_config(case), hardware, cache=cache)
    except HorizonError:
        return None


def _rate(plan: RunPlan | None) -> float | None:
    return plan.prediction.tokens_per_second if plan else None


def resident_units(plan: RunPlan) -> frozenset[int]:
    """Return the units, from the last trainable one down, that fit in the plan's free device memory."""
    room = (plan.planner.limits.device or 0) - plan.prediction.device_bytes
    costs = plan.prediction.costs
    taken: set[int] = set()
    for unit in sorted(costs.plan.trainable, reverse=True):
        room -= sum(predict_bytes([costs.outline.units[unit]], costs.spec).values())
        if room < 0:
            break
        taken.add(unit)
    return frozenset(taken)


def tokens_per_second(plan: RunPlan, resident: frozenset[int]) -> float:
    """Return the planned step's rate with `resident` units; with none, the plan's own."""
    costs = plan.prediction.costs

    def seconds(op: Op) -> float:
        if op.unit not in resident or op.kind not in "UDO":
            return costs.seconds(op)
        if op.kind in "UD":
            return 0.0
        numel = costs.outline.units[op.unit].trainable_numel
        return numel * costs.update_bytes / plan.profile.elementwise.bfloat16

    ops, waits = schedule_of(costs.plan)
    return plan.prediction.tokens / simulate(ops, seconds, waits=waits).seconds
