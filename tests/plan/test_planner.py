"""The planner's choices are good, and it gives its reasons."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.config.memory import TRAINABLE
from horizon_lm.engine.policies import Policies
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.machine.profile import Profile, load_profile
from horizon_lm.plan import fit
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.explain import explain
from horizon_lm.plan.fit import Limits, shortfalls
from horizon_lm.plan.largest import Pooled
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import predict
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.plan.show import describe
from horizon_lm.plan.space import Candidate, Cut
from horizon_lm.words import size
from planned_models import GB, SMALL, config_of, known, outline_of
from sizes import SOAK

pytestmark = pytest.mark.usefixtures("one_thread")


def planner_of(config: TrainConfig, profile: Profile, limits: Limits) -> Planner:
    return Planner(outline_of(config), profile, limits, frozenset(config.model_fields_set))


def plan_of(config: TrainConfig, hardware: str = "auto") -> RunPlan:
    return plan_run(config, hardware, cache=known(config))


STREAMED = {"resident": 0, "rounds": 1}
FEW = {"update": "deferred", "slots": 2, "boundaries": "device"}
LORA = {"adapter": "lora", "target_modules": ["q_proj", "v_proj"]}
FROZEN = {"freeze": ["embed_tokens", r"layers\.[01]\."], "slots": 2, "boundaries": "auto"}
# name: settings, host GB, device MB; each leaves a space that can be searched through
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "ample": (STREAMED | {"tokens_per_step": 256}, 8, 4000),
    "some layers keep": (STREAMED | {"tokens_per_step": 256}, 8, 3.5),
    "few layers keep": (STREAMED | {"tokens_per_step": 1024, "slots": 2}, 8, 7),
    "tight": (STREAMED | {"tokens_per_step": 1024, "slots": 2}, 8, 3),
    "no clipping": (STREAMED | {"tokens_per_step": 256, "max_grad_norm": None}, 8, 30),
    "kept pinned": ({"tokens_per_step": 512, "activations": "recompute"}, 8, 24),
    "slots pinned": (STREAMED | {"tokens_per_step": 512, "slots": 3}, 8, 24),
    "fp32": (STREAMED | {"tokens_per_step": 256, "dtype": "float32"}, 8, 40),
    "residents": (FEW | {"rounds": 1, "tokens_per_step": 512}, 8, 5),
    "residents, little host memory": (FEW | {"rounds": 1, "tokens_per_step": 1024}, 0.00173, 6.7),
    "residents and spills": (
        {"update": "deferred", "slots": 2, "gradient_accumulation_steps": 4, "activations": "recompute"},
        8,
        2.0,
    ),
    "rounds": (FEW | {"resident": 0, "gradient_accumulation_steps": 8}, 8, 7),
    "rounds on a small device": (FEW | {"resident": 0, "gradient_accumulation_steps": 8}, 8, 1.9),
    "both": (FEW | {"tokens_per_step": 512}, 8, 4.2),
    "both, little host memory": (FEW | {"gradient_accumulation_steps": 4}, 0.0015, 6.0),
    "both, ample": (FEW | {"gradient_accumulation_steps": 4}, 8, 4000),
    "an adapter": (FEW | LORA | {"rounds": 1, "tokens_per_step": 512}, 8, 2.2),
    "an adapter on four bits": (FEW | LORA | {"tokens_per_step": 256, "base_dtype": "nf4"}, 8, 2.2),
    "an adapter, little host memory": (FEW | LORA | {"gradient_accumulation_steps": 4}, 0.0005, 2),
    "an adapter, ample": (FEW | LORA | {"rounds": 1, "tokens_per_step": 512}, 8, 4000),
    "frozen layers": (FEW | FROZEN | {"rounds": 1, "tokens_per_step": 256}, 8, 3),
}
# The others in `make soak`.
FEW_CASES = ("some layers keep", "tight", "no clipping", "slots pinned", "residents, little host memory")
FEW_CASES += ("an adapter on four bits", "frozen layers")
FEW_CASES += ("residents and spills", "rounds on a small device", "both, little host memory")


def machine(host_gb: float, device_mb: float) -> tuple[Profile, Limits]:
    """A slow link and a small device, so that every choice matters to a small model."""
    values = load_profile("rtx3090").model_dump()
    values |= {
        "context_bytes": 0.0,
        "process_bytes": 0.0,
        "h2d": 2e9,
        "d2h": 2e9,
        "host": 2e10,
        "optimizer": 1e10,
    }
    values |= {"matmul": {"bfloat16": 5e12, "float32": 2e12}, "device_bytes": device_mb * 1e6}
    values |= {"elementwise": {"bfloat16": 1e11, "float32": 1e11}}
    profile = Profile.model_validate(values)
    return profile, Limits(int(host_gb * GB), int(device_mb * 1e6))


def bound_of(planner: Planner, config: TrainConfig, one: TrainConfig) -> float:
    """The bound by which the search leaves out a combination; 0 for one of another update or slots."""
    search, space = planner._search(config), planner.space_of(config)
    if (one.update, one.slots) != (space.updates()[0], space.slots()[0]):
        return 0.0
    assert isinstance(one.rounds, int) and one.resident != "auto"
    sums = "" if one.rounds == 1 else one.round_sums
    cut = Cut(one.per_device_train_batch_size, one.gradient_accumulation_steps, one.rounds, sums)
    named = [one.resident] if isinstance(one.resident, str) else one.resident
    split = isinstance(named, list) and TRAINABLE in named
    number = named if isinstance(named, int) else len(named) - split
    return search._bounds(Candidate(cut, one.update, one.slots, 0, split))[number]


@pytest.mark.parametrize("name", CASES if SOAK else FEW_CASES)
def test_choices_are_at_most_5_percent_slower_than_the_best(name: str) -> None:
    values, host_gb, device_mb = CASES[name]
    config = config_of(max_length=128, reserve_host_gb=0.0, **values)
    planner = planner_of(config, *machine(host_gb, device_mb))
    fitting = [c for c in planner.space(config) if planner.fits(c)]
    times = [planner.predict(c).seconds for c in fitting]
    for one, seconds in zip(fitting, times, strict=True):
        assert bound_of(planner, config, one) <= seconds * (1 + 1e-9)
    chosen = planner.choose(config)
    assert planner.fits(chosen)
    assert times and planner.predict(chosen).seconds <= 1.05 * min(times)
    assert len(times) < 4 or min(times) < 0.98 * max(times)  # a choice at random would not do


def test_the_last_layers_are_kept_as_many_as_fit() -> None:
    config = config_of(
        max_length=512, per_device_train_batch_size=2, boundaries="device", slots=2, resident=0
    )
    free = planner_of(config, *machine(8, 4000))
    most, least = (
        free.predict(config.replace(activations=policy)).device_bytes for policy in ("keep", "recompute")
    )
    seen = []
    for device_bytes in (most, (most + least) // 2, least):
        planner = planner_of(config, *machine(8, device_bytes / 1e6))
        chosen = planner.choose(config)
        policies = Policies.of(chosen, planner.outline)
        assert policies.kept == frozenset(range(5 - len(policies.kept), 5))
        seen.append(len(policies.kept))
    assert seen[0] == 4 and seen == sorted(seen, reverse=True) and seen[-1] < 4


@pytest.mark.parametrize("device_mb", [2, 3, 4, 40])
def test_the_reason_of_activations_is_what_one_more_layer_would_need(device_mb: float) -> None:
    """Elementwise work is fast here, so that layers keep their products first."""
    config = config_of(max_length=128, reserve_host_gb=0.0, gradient_accumulation_steps=4, **FEW, **STREAMED)
    profile, limits = machine(8, device_mb)
    values = profile.model_dump() | {"elementwise": {"bfloat16": 1e14, "float32": 1e14}}
    planner = planner_of(config, Profile.model_validate(values), limits)
    chosen = planner.choose(config)
    reason = next(c.reason for c in explain(config, chosen, planner) if c.key == "activations")
    if device_mb == 40:
        assert (chosen.activations, reason) == ("keep", "all layers fit")
        return
    found = re.match(r"(?:keeping|products in) (\d) layers would need (.*) of device memory more", reason)
    assert found
    policy, number = "keep" if reason.startswith("keep") else "products", int(found[1])
    of_policies = Policies.of(chosen, planner.outline)
    assert number == len(of_policies.kept if policy == "keep" else of_policies.products) + 1
    lesser = {"keep": "products", "products": "recompute"}[policy]
    wanted = chosen.replace(activations=[f"{lesser}*{4 - number}", f"{policy}*{number}"])
    (short,) = shortfalls(wanted, planner.predict(wanted), limits)
    assert size(short.bytes) == found[2]


def test_every_cut_of_a_long_step_is_considered() -> None:
    config = config_of(max_length=128, gradient_accumulation_steps=8192)
    cuts = planner_of(config, *machine(8, 4000))._search(config)._cuts("deferred", 2)
    assert {cut.rounds for _, _, cut in cuts} == {2**n for n in range(14)}


def test_pins_that_contradict_each_other_are_refused() -> None:
    config = config_of(max_length=128, tokens_per_step=1024, per_device_train_batch_size=3)
    with pytest.raises(ConfigError, match=r"tokens_per_step=1024 \(8 x 128\) does not go with"):
        planner_of(config, *machine(8, 4000)).choose(config)
    config = config_of(max_length=128, tokens_per_step=1024, per_device_train_batch_size=2)
    chosen = planner_of(config, *machine(8, 4000)).choose(config)
    assert (chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps) == (2, 4)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        (
            {"rounds": 3},
            "rounds=3 does not divide any number of micro-batches that tokens_per_step allows "
            "(1, 2, 4, 8, ..., 64)",
            "set rounds=2 or rounds=auto",
        ),
        (
            {"rounds": 3, "round_sums": "add", "per_device_train_batch_size": 8},
            "rounds=3 does not divide any number of micro-batches that tokens_per_step allows (8)",
            "set rounds=8 or rounds=auto",
        ),
        (
            {"rounds": 4, "round_sums": "add", "per_device_train_batch_size": 8},
            "round_sums=add needs one micro-batch per round, but rounds=4 is not a number of micro-batches "
            "that tokens_per_step allows (8)",
            "set rounds=8 or round_sums=host",
        ),
    ],
)
def test_rounds_that_suit_no_cut_are_refused(values: dict[str, Any], message: str, hint: str) -> None:
    values |= {"max_length": 128, "tokens_per_step": 64 * 128}
    config = config_of(**values)
    with pytest.raises(ConfigError) as caught:
        planner_of(config, *machine(8, 4000)).choose(config)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    hinted = config_of(**values | {"rounds": int(re.findall(r"rounds=(\d+)", hint)[0])})
    assert next(iter(planner_of(hinted, *machine(8, 4000)).space(hinted)))


@pytest.mark.parametrize(
    ("resident", "reason"),
    [
        (["embedding"], "embedding lives on the device"),
        (["embedding", "head"], "embedding and head live on the device"),
        (["layer 2"], "1 of 4 layers lives on the device"),
        (["layer 2", "layer 0"], "2 of 4 layers live on the device"),
        (["embedding", "head", "layer 1"], "embedding, head and 1 of 4 layers live on the device"),
    ],
)
def test_a_plan_says_in_words_what_is_resident(resident: list[str], reason: str) -> None:
    config = config_of(max_length=128)
    planner = Planner(outline_of(config), *machine(8, 4000), frozenset())
    chosen = config.replace(resident=resident, boundaries="host", update="deferred")
    reasons = {choice.key: choice.reason for choice in explain(config, chosen, planner)}
    assert reasons["resident"] == reason
    assert reasons["boundaries"].startswith("spilling these inputs to host memory leaves device memory")


def test_sizes_of_a_plan_stand_in_one_column() -> None:
    text = describe(plan_of(config_of(max_length=128, resident=3), "rtx3090"), largest=False)
    rows = text[text.index("\nhost ") : text.index("\nchoices")].splitlines()
    assert any(row.startswith("  resident_exp_avg_sq") for row in rows)
    assert len({len(row) for row in rows if row}) == 1


def test_a_plan_gives_its_reasons() -> None:
    plan = plan_of(config_of(max_length=128, tokens_per_step=512, slots=3), "rtx3090")
    reasons = {choice.key: choice for choice in plan.choices}
    assert reasons["slots"].pinned and reasons["slots"].reason == "as configured"
    assert not reasons["activations"].pinned and reasons["activations"].reason == "all layers fit"
    assert "simulated" in plan.to_dict()["hardware"]["figures"]
    assert plan.to_dict()["tokens_per_step"] == 512


def test_the_largest_that_fits_is_just_below_what_does_not() -> None:
    config = config_of(max_length=128)
    planner = planner_of(config, *machine(0.05, 40))
    chosen = planner.choose(config.replace(reserve_host_gb=0.0))
    plan = RunPlan(chosen, planner, planner.predict(chosen), [], [], "a machine")
    most = plan.largest()
    base = plan.config.replace(activations="recompute", boundaries="host")
    batch = most["per_device_train_batch_size"]
    for rows, fits in ((batch, True), (int(batch * 1.3) + 2, False)):
        assert planner.fits(planner.pooled(base.replace(per_device_train_batch_size=rows))) == fits
    assert most["layers"] > 4 and most["parameters"] > planner.outline.num_parameters


FILLED = {"update": "deferred", "slots": 2, "rounds": 1, "tokens_per_step": 4096, "loss_chunk_tokens": 512}
# name: settings, host GB, device MB, the fewest layers that `largest` must find
SHARES: dict[str, tuple[dict[str, Any], float, float, int]] = {
    "more residents than half the model has": (FILLED, 0.0008, 9, 4),
    "inputs too large for the host": (FILLED, 0.002, 12, 6),
    "rounds that only the plan needs": ({"max_length": 1024, "gradient_accumulation_steps": 2}, 0.01, 20, 20),
    "residents as configured": ({"resident": 4, "per_device_train_batch_size": 4}, 0.0015, 7.5, 4),
    "residents by name": ({"resident": ["layer 3"]}, 0.003, 4.5, 5),
    "an adapter": (LORA | {"loss_chunk_tokens": 512}, 0.0006, 2.5, 12),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_largest_sizes_are_at_least_the_plans(name: str) -> None:
    """And they fit: the planner finds choices for the deepest model."""
    values, host_gb, device_mb, layers = SHARES[name]
    config = config_of(**{"max_length": 128, "reserve_host_gb": 0.0} | values)
    planner = planner_of(config, *machine(host_gb, device_mb))
    chosen = planner.choose(config)
    most = RunPlan(chosen, planner, planner.predict(chosen), [], [], "a machine").largest()
    for key in ("per_device_train_batch_size", "max_length"):
        assert most[key] >= getattr(chosen, key), key
    assert layers <= most["layers"] < 1.5 * layers
    deeper = replace(planner, outline=planner.outline.with_layers(most["layers"]), _seen={}, _outlines={})
    assert deeper.fits(deeper.choose(config))


@pytest.mark.parametrize("values", [{}, {"max_grad_norm": None}, {"rounds": 4, "round_sums": "host"}])
def test_residents_leave_the_memory_that_a_simulation_with_them_finds(values: dict[str, Any]) -> None:
    """But for two stored inputs of 16 kB, which other steps free earlier or later."""
    values = values | {"gradient_accumulation_steps": 4, "activations": "recompute", "boundaries": "host"}
    config = config_of(max_length=128, reserve_host_gb=0.0, **values)
    planner = planner_of(config, *machine(0.0023 if "rounds" in values else 0.0015, 8))
    pooled = planner.pooled(config)
    assert 2 <= pooled.resident <= 5
    exact = fit.rest_bytes(pooled, planner.predict(pooled), planner.limits)
    assert Pooled(planner, config).rest() == pytest.approx(exact, abs=2 << 14)


@pytest.mark.parametrize("resident", [5, ["layer 3", "head"]])
def test_the_largest_sizes_of_a_run_that_does_not_fit_are_smaller(resident: int | list[str]) -> None:
    """Fewer layers have fewer units than the configuration asks to be resident."""
    config = config_of(max_length=128, reserve_host_gb=0.0, resident=resident, skip_memory_check=True)
    planner = planner_of(config, *machine(0.0018, 3))
    chosen = planner.choose(config)
    assert not planner.fits(chosen)
    assert RunPlan(chosen, planner, planner.predict(chosen), [], [], "a machine").most_layers() in (1, 2)


def test_costs_of_ops_are_not_negative_and_of_every_kind() -> None:
    settings = ModelSettings(boundaries="host", activations=["recompute*3", "keep"])
    outline = Outline(LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"}), settings)
    found = predict(outline, settings, load_profile("gh200"), batch=1, tokens=64, micro_batches=2)
    seconds = {}
    for op, start, end in found.simulation.spans:
        seconds.setdefault(op.kind, []).append(end - start)
    assert set("UFXLRBDNO") <= set(seconds)
    assert all(min(values) > 0 for kind, values in seconds.items() if kind != "N")


def test_a_choice_that_does_not_exist_is_no_way_out() -> None:
    config = config_of(max_length=128)
    with pytest.raises(DoesNotFitError):
        planner_of(config, *machine(0.0001, 4000)).choose(config)


@pytest.mark.parametrize(
    ("resident", "memory", "device_mb"), [(0, "host", 6.7), (1, "host", 6.7), (6, "device", 4)]
)
def test_too_few_or_too_many_residents_are_left_to_the_planner(
    resident: int, memory: str, device_mb: float
) -> None:
    """The hint starts with what fits with the same results, and it does fit."""
    values, host_gb, _ = CASES["residents, little host memory"]
    config = config_of(max_length=128, reserve_host_gb=0.0, **values)
    sizes = machine(host_gb, device_mb)
    asked = config.replace(resident=resident)
    with pytest.raises(DoesNotFitError, match=f"^{memory} memory") as caught:
        planner_of(asked, *sizes).choose(asked)
    hint = caught.value.hint or ""
    assert re.match(r"resident=auto saves [0-9.]+ [kM]B; ", hint), hint
    assert not re.search("moment_dtype|optim|max_grad_norm|max_length", hint)
    planner = planner_of(config, *sizes)
    assert planner.fits(planner.choose(config))


def test_the_plan_of_a_large_model_takes_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 B with all that `horizon plan` prints: layers run on fake tensors, and schedules simulated.
    The largest sizes took 18 and 46 by doubling and halving; the search takes about 70 simulations."""
    from horizon_lm.plan import outline as outline_module
    from horizon_lm.plan import steps as steps_module

    counts = {"layers": 0, "simulations": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    measure, run = outline_module.layer_working_set, steps_module.simulate
    monkeypatch.setattr(outline_module, "layer_working_set", counted("layers", measure))
    monkeypatch.setattr(steps_module, "simulate", counted("simulations", run))
    model = {"model_type": "qwen2", "max_position_embeddings": 131072, "vocab_size": 152064}
    model |= {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48}
    model |= {"num_attention_heads": 40, "num_key_value_heads": 8}
    plan = plan_run(config_of(init_model=model, max_length=2048), "h200-1.5tb")
    assert plan.largest()["layers"] > 200
    assert 2 <= counts["layers"] <= 12 and 10 <= counts["simulations"] <= 130


def test_the_largest_sizes_of_a_long_step_are_found_by_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from horizon_lm.plan import steps as steps_module

    values = {"max_length": 128, "gradient_accumulation_steps": 256, "rounds": 1, "resident": 0}
    simulated: list[int] = []
    run = steps_module.simulate

    def counted(ops: Any, *args: Any, **kwargs: Any) -> Any:
        simulated.append(1 + max(op.micro_batch for op in ops))
        return run(ops, *args, **kwargs)

    monkeypatch.setattr(steps_module, "simulate", counted)
    plan = plan_run(config_of(**values), "rtx3090")
    assert max(simulated) == 256  # the step itself, at the end
    simulated.clear()
    assert plan.largest()["layers"] > 100
    assert 0 < max(simulated) <= 100


def test_what_only_device_memory_has_is_not_chosen_on_a_cpu() -> None:
    on_cpu = {choice.key for choice in plan_of(config_of(max_length=128), "cpu-2core").choices}
    on_gpu = {choice.key for choice in plan_of(config_of(max_length=128), "rtx3090").choices}
    assert on_gpu - on_cpu == {"boundaries", "slots", "grad_slots", "loss_chunk_tokens", "resident", "rounds"}
    pinned = plan_of(config_of(max_length=128, slots=3), "cpu-2core").choices
    assert [choice.pinned for choice in pinned if choice.key == "slots"] == [True]


def test_the_end_of_the_search_is_not_called_the_largest() -> None:
    text = describe(plan_of(config_of(max_length=128), "h200-1.5tb"))
    assert "per_device_train_batch_size 4,096 or more at max_length 128" in text
    assert "1,024 or more layers of this kind" in text
    assert re.search(r"max_length [0-9,]+, all positions of the model,", text)
    config = config_of(max_length=128)
    planner = planner_of(config, *machine(0.05, 40))
    chosen = planner.choose(config.replace(reserve_host_gb=0.0))
    small = describe(RunPlan(chosen, planner, planner.predict(chosen), [], [], "a small machine"))
    largest = small[small.index("largest that fits") :]
    assert "layers of this kind" in largest and "or more" not in largest
    assert "0.000" not in small and "0.00 " not in small.replace("0.00 ms", "")


def test_more_tokens_a_step_are_advised_where_the_update_limits() -> None:
    """The advice is what the planner predicts for it; where compute limits there is none."""
    config = config_of(max_length=16, per_device_train_batch_size=1, max_grad_norm=None, resident=0)
    plan = plan_of(config, "h100-sxm")
    assert plan.prediction.limit().startswith("update")
    (advice,) = [note for note in plan.all_notes() if "gradient_accumulation_steps=" in note]
    wanted, rate = re.search(r"gradient_accumulation_steps=(\d+) .* give ([\d,]+) tokens/s", advice).groups()
    more = plan_of(config.replace(gradient_accumulation_steps=int(wanted)), "h100-sxm")
    assert int(rate.replace(",", "")) > plan.prediction.tokens_per_second * 1.05
    found = plan.planner.predict(plan.config.replace(gradient_accumulation_steps=int(wanted)))
    assert rate == f"{found.tokens_per_second:,.0f}" and more.prediction.tokens == int(wanted) * 16
    enough = plan_of(config_of(max_length=128, gradient_accumulation_steps=64), "cpu-2core")
    assert enough.prediction.limit().startswith("compute") and enough.all_notes() == enough.notes


@pytest.mark.parametrize("rounds", [2, "auto"])
def test_the_advice_has_a_round_for_each_micro_batch_if_the_host_adds(rounds: int | str) -> None:
    """The advice can be pasted: rounds are named if the configuration names them."""
    values: dict[str, Any] = {"max_length": 16, "max_grad_norm": None, "resident": 0, "round_sums": "add"}
    values |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    config = config_of(**values, rounds=2)
    slow = load_profile("h100-sxm").model_copy(update={"optimizer": 1e9})
    planner = planner_of(config.replace(rounds=rounds), slow, Limits.of_profile(slow))
    planner.choose(config.replace(rounds=rounds))
    plan = RunPlan(config, planner, planner.predict(config), [], [], "a machine")
    assert plan.prediction.limit().startswith("update")
    (advice,) = plan.all_notes()
    found = re.search(r": (gradient_accumulation_steps=(\d+)( rounds=(\d+))?) \(", advice)
    assert found is not None and (found[4] == found[2] if rounds == 2 else found[3] is None)
    assert int(found[2]) > 2


def test_this_machine_is_not_called_one_that_is_not_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing has been measured
    plan = plan_of(config_of(max_length=128, device="cpu"))
    assert "not measured here" not in describe(plan) and plan.machine.startswith("this one")
    assert "`horizon doctor` measures it" in plan.machine
    assert "not measured here" in describe(plan_of(config_of(max_length=128), "cpu-2core"))


def test_the_largest_loss_chunk_that_fits_beside_the_rest() -> None:
    """Nothing else gives way for it, and it is at most a micro-batch."""
    many = SMALL | {"vocab_size": 1 << 17}  # at least 1,024 tokens
    config = TrainConfig.from_dict({**config_of(max_length=2048).to_dict(), "init_model": many})
    config = config.replace(
        per_device_train_batch_size=3, activations="recompute", boundaries="device", slots=2, resident=0
    )
    free = planner_of(config, *machine(32, 64000))
    needed = {c: free.predict(config.replace(loss_chunk_tokens=c)).device_bytes for c in free.chunks(config)}
    assert list(needed) == [8192, 4096, 2048, 1024]
    assert needed[1024] == free.predict(config).device_bytes  # what auto is at least, and on the CPU
    best = free.choose(config)
    assert best.loss_chunk_tokens == 8192
    for tokens in (4096, 1024):
        planner = planner_of(config, *machine(32, (needed[tokens] + 1) / 1e6))
        chosen = planner.choose(config)
        assert planner.fits(chosen) and chosen == best.replace(loss_chunk_tokens=tokens)
    with pytest.raises(DoesNotFitError):
        planner_of(config, *machine(32, (needed[1024] - 1) / 1e6)).choose(config)
    assert free.choose(config.replace(max_length=256)).loss_chunk_tokens == 1024
    assert free.choose(config.replace(loss_chunk_tokens=77)).loss_chunk_tokens == 77
    assert planner_of(config, load_profile("cpu-2core"), free.limits).chunks(config) == []


def test_a_plan_names_the_loss_chunk() -> None:
    chosen = {c.key: c for c in plan_of(config_of(max_length=128), "rtx3090").choices}["loss_chunk_tokens"]
    assert isinstance(chosen.value, int) and chosen.reason == "the largest chunk considered"
    given = plan_of(config_of(max_length=128, loss_chunk_tokens=32), "rtx3090").choices
    assert {c.key: (c.value, c.reason) for c in given}["loss_chunk_tokens"] == (32, "as configured")
