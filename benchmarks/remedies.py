"""Simulated gains from remedies for a run that its host or bus limits: the engine's schedule with the
planner's costs, each time with the planner's choices."""

from __future__ import annotations

from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.errors import HorizonError
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.run_plan import RunPlan, plan_run

HEAD = ["run", "profile", "remedy", "tokens/s, SIMULATED", "over as it was, SIMULATED"]


def rows(name: str, case: Case, hardware: str = "auto") -> list[list[str]]:
    """Return a row of HEAD for each remedy; `-` if it does not fit."""
    cache = OutlineCache()  # no remedy changes the model
    as_it_was = _plan(case, hardware, cache)
    found: dict[str, float | None] = {"as it was": _rate(as_it_was)}
    found["bf16 moments"] = _rate(
        _plan(case.replace(extra=case.extra | {"moment_dtype": "bfloat16"}), hardware, cache)
    )
    twice = case.replace(sequences=2 * case.sequences)
    found["twice the tokens a step"] = _rate(_plan(twice, hardware, cache))
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
