"""Plans of models with adapters, frozen parts and bases in few bits: the bytes that training allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import horizon_lm as hz
from adversarial import adversarial_lanes
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.machine.profile import load_profile
from horizon_lm.memory.live import LiveBytes
from horizon_lm.memory.shards import Shard, UnitShard
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.fleet import Fleet, Network
from horizon_lm.plan.predict import Sizes, costs_of, predict, prediction_of
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.plan.show import describe
from planned_models import SMALL, config_of, known, outline_of
from planned_ranks import profile_of

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "tied": SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    "experts": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_r": 4, "target_modules": ATTENTION},
    "dora": {"adapter": "dora", "lora_r": 2, "target_modules": ["q_proj", "v_proj"]},
    "a module whole": {"adapter": "lora", "target_modules": ["v_proj"], "modules_to_save": ["k_proj"]},
    "frozen layers": {"freeze": [r"layers\.[01]\.", "embed_tokens"]},
    "two modules": {"train": [r"layers\.3\.self_attn", "norm"]},
}


def model_of(values: dict[str, Any], settings: dict[str, Any]) -> hz.HostModel:
    return hz.HostModel.from_config(values, ModelSettings(device="cpu", skip_memory_check=True, **settings))


def steps(config: TrainConfig, tokens: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (1, tokens), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


PARTS = ("weights", "frozen", "packed", "residual", "exp_avg", "exp_avg_sq", "grads", "gradient_slots")
CPU = "cpu-2core"


def check_bytes(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    """Compare the planned host bytes of a step of two micro-batches, by part, with those of a model that did
    one; return them."""
    config = config_of(
        init_model=values, device="cpu", max_length=16, gradient_accumulation_steps=2, **settings
    )
    model, outline = model_of(values, settings), outline_of(config)
    assert outline.units == model.skeleton.units
    costs = costs_of(outline, config, load_profile(CPU), Sizes(1, 16, 2))
    assert costs.plan == model.engine.spec(2)
    model.train_step(steps(config, 16, 2), lr=0.0)
    found, planned = model.memory_bytes(), prediction_of(costs).host
    for part in (*PARTS, "weight_slots", *(name for name in found if name.startswith("resident_"))):
        assert planned.get(part, 0) == found.get(part, 0), part
    return planned


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_a_store_takes_the_planned_bytes(name: str, trained: str) -> None:
    """To the byte. Frozen parameters take two bytes, and no moments or gradients."""
    values, settings = MODELS[name], TRAINED[trained]
    planned = check_bytes(values, settings)
    units = outline_of(config_of(init_model=values, max_length=16, **settings)).units
    trainable, numel = (sum(map(of, units)) for of in (lambda u: u.trainable_numel, lambda u: u.numel))
    assert trainable < 0.7 * numel
    assert (planned["weights"], planned["exp_avg"], planned["grads"]) == (
        2 * numel,
        4 * trainable,
        2 * trainable,
    )


NF4, APART = {"base_dtype": "nf4"}, {"resident": "trainable"}
PACKED: dict[str, tuple[str, dict[str, Any], float]] = {
    "nf4": ("llama", TRAINED["lora"] | NF4, 0.532),
    "int8": ("experts", TRAINED["lora"] | {"base_dtype": "int8"}, 1.064),
    "frozen layers in nf4": ("tied", TRAINED["frozen layers"] | NF4, 0.532),
    "trainable parts apart": ("llama", TRAINED["lora"] | APART, 2),
    "nf4 and trainable parts apart": ("llama", TRAINED["lora"] | NF4 | APART, 0.532),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_and_split_units_take_the_planned_bytes(case: str) -> None:
    """And a packed parameter takes about half a byte, or one, with its scales; padding counts in so small
    a model."""
    name, settings, each = PACKED[case]
    planned = check_bytes(MODELS[name], settings)
    units = outline_of(config_of(init_model=MODELS[name], max_length=16, **settings)).units
    packed = sum(unit.packed_numel for unit in units)
    assert (packed > 0) == ("base_dtype" in settings) == ("packed" in planned)
    if packed:
        assert planned["packed"] == pytest.approx(each * packed, rel=0.03)
        assert planned["weights"] + planned.get("frozen", 0) + planned.get("resident_weights", 0) == 2 * (
            sum(unit.numel for unit in units) - packed
        )


@pytest.mark.parametrize("more", ["", "resident", "nf4", "int8 resident"])
def test_device_buffers_take_the_planned_bytes(more: str) -> None:
    """As on a GPU: adversarial lanes have slots apart from the store, staging slots among them."""
    settings = TRAINED["lora"] | ({"resident": "trainable"} if "resident" in more else {"resident": 0})
    settings |= {"base_dtype": more.split()[0]} if more.startswith(("nf4", "int8")) else {}
    config = config_of(device="cuda", max_length=16, **settings)
    costs = costs_of(outline_of(config), config, load_profile("h100-sxm"), Sizes(1, 16, 1))
    with adversarial_lanes():
        model = model_of(SMALL, settings)
    found, planned = model.engine.ops.slot_bytes, costs.fixed_bytes()
    assert {name: planned.get(name, 0) for name in found} == found
    assert ("staging_slots" in found) == ("base_dtype" in settings)
    homes = {name: size for name, size in model.store.device_bytes.items() if size}
    assert {name: planned[name] for name in homes} == homes
    assert bool(homes) == ("resident" in more)


STEPS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "target_modules": ATTENTION, "activations": "recompute"},
    "lora, all kept": {"adapter": "lora", "activations": "keep"},
    "dora": {"adapter": "dora", "target_modules": ["q_proj", "down_proj"], "activations": "recompute"},
    "nf4": {"adapter": "lora", "base_dtype": "nf4", "activations": "recompute"},
    "frozen layers": {"freeze": [r"layers\.[012]\.", "embed_tokens"], "activations": "keep"},
}


@pytest.mark.parametrize("name", STEPS)
def test_bytes_of_a_step_with_an_adapter_are_predicted(name: str) -> None:
    """All that a step allocates beside store and slots, against torch's own allocations, within 6 %."""
    wide = SMALL | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    settings = STEPS[name]
    config = config_of(init_model=wide, max_length=512, device="cpu", **settings)
    model, batches = model_of(wide, settings), steps(config, 512, 1)
    model.train_step(batches, lr=0.0)  # buffers that stay are made in the first step
    with LiveBytes() as live:
        model.train_step(batches, lr=0.0)
    planned = predict(
        outline_of(config), config, load_profile(CPU), batch=1, tokens=512, micro_batches=1
    ).host
    taken = sum(
        size for part, size in planned.items() if part not in {*PARTS, "process", "heap", "weight_slots"}
    )
    assert taken == pytest.approx(live.peak, rel=0.06), planned


def test_ranks_hold_shares_of_whole_units() -> None:
    """An eighth of the frozen parameters each, with the trainable ones; few bits are refused by name."""
    fleet, profile = Fleet(2, 4), profile_of()
    network = Network.of(fleet, profile)

    def costs(**values: Any) -> Costs:
        config = config_of(device="cuda", **TRAINED["lora"] | values)
        return costs_of(outline_of(config), config, profile.of_rank(4), Sizes(1, 64, 8), network)

    found = costs()
    units = found.outline.units
    assert not found.plan.split and not found.spec.split and found.plan.world == 8
    host = prediction_of(found).host
    wanted = [UnitShard(unit, Shard(0, 8)) for unit in units]
    assert (
        host["weights"]
        == 2 * sum(share.weights_numel for share in wanted)
        >= 2 * sum(u.numel for u in units) / 8
    )
    assert host["exp_avg"] == 4 * sum(share.trainable_share for share in wanted)
    with pytest.raises(ConfigError, match="base_dtype=nf4 is not supported with 8 ranks"):
        costs(base_dtype="nf4")
    with pytest.raises(ConfigError, match="resident=trainable is not supported with 8 ranks"):
        costs(resident="trainable")


def test_a_plan_says_what_is_trained() -> None:
    """Only if something is frozen; and with which memory, where `host_memory_gb` replaces the profile's."""
    config = config_of(max_length=16, host_memory_gb=32, **TRAINED["lora"], base_dtype="nf4")
    plan = plan_run(config, "rtx3090", cache=known(config))
    text = describe(plan, largest=False)
    assert "trained    7,168 parameters (3.37%)" in text and "frozen, linear layers in nf4" in text, text
    assert "note: 32.0 GB of host memory as host_memory_gb states, whatever rtx3090 has" in text
    assert "trainable parts" in text and plan.to_dict()["model"]["trained_parameters"] == 7168
    full = config_of(max_length=16)
    assert "\ntrained " not in describe(plan_run(full, "rtx3090", cache=known(full)), largest=False)
