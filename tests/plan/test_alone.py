"""Plans of one rank that works as one of several (`reduction: exact`): memory, time, choices."""

from __future__ import annotations

from typing import Any

import pytest

from horizon_lm.machine.profile import load_profile
from horizon_lm.memory.regions import predict_bytes
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.fleet import ONE
from horizon_lm.plan.predict import Sizes, costs_of, prediction_of
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.plan.show import describe
from horizon_lm.schedule import Op
from planned_models import config_of, known, outline_of
from planned_ranks import allocated, planners_of, profile_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "values",
    [
        {"update": "deferred"},
        {"rounds": 2, "round_sums": "device"},
        {"rounds": 4, "round_sums": "add", "grad_slots": 3},
        {"dtype": "float32", "checkpoint_interval": 3},
        {"update": "eager", "max_grad_norm": None, "freeze": ["layers.1."]},
    ],
    ids=str,
)
def test_what_is_allocated_is_predicted_to_the_byte(values: dict[str, Any]) -> None:
    values = values | {"reduction": "exact"}
    config = config_of(gradient_accumulation_steps=4, device="cpu", max_length=16, **values)
    planned = costs_of(outline_of(config), config, load_profile("cpu-2core"), Sizes(1, 16, 4))
    parts = planned.fixed_bytes() | predict_bytes(planned.outline.units, planned.spec)
    parts["shares"] = sum(parts.pop(part, 0) for part in ("gradient_shards", "gradient_sums", "exchange"))
    assert {name: size for name, size in allocated(values, 4, 16).items() if size} == parts
    assert parts["weight_slots"] and parts["shares"]


def costs(**values: Any) -> Costs:
    """Costs of a step of 8 micro-batches [1, 64] on a GPU."""
    config = config_of(device="cuda", **values)
    return costs_of(outline_of(config), config, profile_of(), Sizes(1, 64, 8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ops_cost_what_their_copies_take(dtype: str) -> None:
    """By hand, for a layer: weights are copied once more, each gradient is copied and added in fp32."""
    found, size = costs(reduction="exact", dtype=dtype), 2 if dtype == "bfloat16" else 4
    numel = found.outline.units[1].numel
    assert found.seconds(Op("U", 1)) == pytest.approx(numel * size / 2e9)
    assert found.seconds(Op("J", 1)) == pytest.approx(2 * numel * size / 1e11)
    for first, added in ((True, size + 4), (False, size + 8)):
        total = found.seconds(Op("T", 1, first=first))
        assert total == pytest.approx(numel * (2 * size + added) / 1e11)


def test_a_step_has_the_copies_and_the_buffers_for_them() -> None:
    exact, in_place = (prediction_of(costs(reduction=reduction)) for reduction in ("exact", "auto"))
    kinds = [op.kind for op, _, _ in exact.simulation.spans if op.unit == 2]
    assert kinds.count("T") == 8 and kinds.count("J") == 2
    assert exact.lanes()["network"] > 0 and "network" not in in_place.lanes()
    assert exact.seconds > in_place.seconds
    more = {"weight_shards", "gradient_shards", "exchange"}
    assert exact.device.keys() - in_place.device.keys() == more
    assert exact.device["weight_shards"] == exact.device["weight_slots"] == in_place.device["weight_slots"]


def test_the_search_finds_about_the_best() -> None:
    config = config_of(
        tokens_per_step=256, max_length=64, device="cuda", update="deferred", slots=2, boundaries="device"
    ).replace(reserve_host_gb=0.0, reduction="exact", resident=0)
    planner = planners_of(config, profile_of(device_bytes=4e6))(ONE)
    fitting = [c for c in planner.space(config) if planner.fits(c)]
    times = [planner.predict(c).seconds for c in fitting]
    chosen = planner.choose(config)
    assert planner.fits(chosen) and planner.predict(chosen).seconds <= 1.05 * min(times)
    assert min(times) < 0.9 * max(times)
    assert {c.rounds for c in fitting} > {1} and {c.round_sums for c in fitting} <= {"auto", "device", "host"}


def test_a_plan_shows_it() -> None:
    def plan(**values: Any) -> Any:
        config = config_of(tokens_per_step=4096, max_length=64, device="cuda", **values)
        return plan_run(config, "h100-sxm", cache=known(config))

    exact, fast = plan(reduction="exact"), plan(reduction="fast")
    shown = describe(exact, largest=False)
    assert "reduction = exact" in shown and "network" in shown and "gradient_shards" in shown
    words = ("reduction =", "network", "gradient_shards")
    assert not any(word in describe(fast, largest=False) for word in words)
    assert exact.to_dict()["lane_seconds"]["network"] > 0
