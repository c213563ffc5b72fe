"""The size of a step from which on the GPU is busy, and plans of each experts' implementation."""

from __future__ import annotations

import re
from typing import Any

import pytest

import zoo
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan.busy import BUSY, compute_share
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import Prediction
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.plan.show import describe

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
COMMON |= {"vocab_size": 512, "max_position_embeddings": 1024}
MIXTURE = COMMON | {"model_type": "mixtral", "intermediate_size": 512}
MIXTURE |= {"num_local_experts": 16, "num_experts_per_tok": 2}
DENSE = COMMON | {"model_type": "llama", "intermediate_size": 1024}
SETTINGS: dict[str, Any] = {"datasets": ["none.txt"], "max_length": 256, "resident": 0, "max_grad_norm": None}
SETTINGS |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "rounds": 1}


def settings_of(found: Prediction) -> TrainConfig:
    assert isinstance(found.settings, TrainConfig)
    return found.settings


def plan_of(model: dict[str, Any], hardware: str = "h100-pcie", **settings: Any) -> RunPlan:
    return plan_run(TrainConfig(init_model=model, **{**SETTINGS, **settings}), hardware)


@pytest.fixture(scope="module")
def plans() -> dict[str, RunPlan]:
    return {"mixture": plan_of(MIXTURE), "dense": plan_of(DENSE)}


@pytest.mark.parametrize("kind", ["mixture", "dense"])
def test_the_gpu_is_busy_from_there_on_and_not_before(kind: str, plans: dict[str, RunPlan]) -> None:
    """By the simulated plan itself; the number found is at most a sixteenth above the smallest."""
    plan = plans[kind]
    busy = plan.busy
    assert busy is not None and compute_share(plan.prediction) < BUSY <= compute_share(busy)
    number = busy.micro_batches
    assert number > 1 and plan.planner.fits(settings_of(busy))

    def share(micro_batches: int) -> float:
        changed = settings_of(busy).replace(gradient_accumulation_steps=micro_batches)
        return compute_share(plan.planner.predict(changed))

    assert share(number - max(1, number // 16) - 1) < BUSY
    assert all(share(n) >= BUSY for n in (number + 1, 2 * number, 5 * number))


def test_mixtures_need_more_tokens(plans: dict[str, RunPlan]) -> None:
    """A token visits as many parameters in both; all 16 experts are moved and updated, not two."""
    mixture, dense = plans["mixture"].busy, plans["dense"].busy
    assert mixture is not None and dense is not None
    assert mixture.tokens > 2 * dense.tokens


def test_the_plan_says_so(plans: dict[str, RunPlan]) -> None:
    for kind, plan in plans.items():
        text, busy = describe(plan, largest=False), plan.busy
        assert busy is not None
        assert f"the GPU computes for 90% of a step of {busy.tokens:,} tokens or more" in text
        assert ("each step moves all experts" in text) == (kind == "mixture")
        assert ("experts by grouped_mm" in text) == (kind == "mixture")
        values = plan.to_dict()
        assert values["busy_tokens_per_step"] == busy.tokens
        assert values["model"].get("experts") == ("grouped_mm" if kind == "mixture" else None)


def test_a_wait_for_the_bus_is_answered_by_tokens() -> None:
    """The advice is what the planner predicts; where the GPU is busy, and on a CPU, there is none."""
    slow = load_profile("h100-pcie").model_copy(update={"h2d": 2e9, "d2h": 2e9})
    plan = plan_of(MIXTURE)
    waiting = RunPlan(plan.config, plan.planner, plan.prediction, plan.choices, [], "a machine")
    waiting.planner.profile = slow
    waiting.planner._seen.clear()
    waiting = RunPlan(plan.config, plan.planner, plan.planner.predict(plan.config), plan.choices, [], "slow")
    assert not waiting.prediction.limit().startswith("update")
    (advice,) = waiting.all_notes()
    found = re.search(
        r"waits for (\d+)% .* gradient_accumulation_steps=(\d+) .* give ([\d,]+) tokens/s", advice
    )
    assert found is not None and waiting.busy is not None
    assert found[3] == f"{waiting.busy.tokens_per_second:,.0f}"
    more = plan.config.replace(gradient_accumulation_steps=int(found[2]))
    assert compute_share(waiting.planner.predict(settings_of(waiting.busy))) >= BUSY
    assert waiting.planner.predict(more).tokens == waiting.busy.tokens
    enough = RunPlan(settings_of(waiting.busy), plan.planner, waiting.busy, plan.choices, [], "slow")
    assert enough.all_notes() == []
    on_cpu = plan_of(DENSE, "cpu-2core", resident="auto")
    assert on_cpu.busy is None and "the GPU" not in describe(on_cpu, largest=False)


def test_each_implementation_is_planned() -> None:
    """eager and grouped_mm do the same arithmetic; batched_mm copies weights for each token."""
    flops, held = {}, {}
    for name in ("grouped_mm", "eager", "batched_mm"):
        settings = ModelSettings(device="cpu", experts_implementation=name)
        outline = Outline(zoo.CASES["mixtral"].config(), settings)
        assert outline.facts.experts == name
        passes = outline.measures(1, 64, 64).layers[0].recomputed
        work = (passes.forward.work + passes.backward.work).items()
        flops[name] = sum(kernel.flops * times for kernel, times in work if kernel.kind == "matmul")
        held[name] = passes.backward.bytes
    assert flops["eager"] == pytest.approx(flops["grouped_mm"], rel=0.02)
    assert held["batched_mm"] > 5 * held["grouped_mm"]
    assert 0.5 < held["eager"] / held["grouped_mm"] < 2
