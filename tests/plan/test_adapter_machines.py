"""Llama 3.1 70B with an adapter on a 24 GB card, by the base's format and the host's memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.explain import explain
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.predict import Prediction
from planned_models import GB, config_of, folder_of, outline_of
from sizes import SOAK

pytestmark = pytest.mark.usefixtures("one_thread")

# meta-llama/Llama-3.1-70B, config.json
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LORA = {"adapter": "lora", "max_length": 2048}
# What the planner would otherwise search for, which takes most of the time.
PINNED = {"activations": "recompute", "boundaries": "host", "slots": 2, "rounds": 1, "update": "deferred"}
FROZEN = 70_553_706_496  # parameters of the base


def config_70b(**values: Any) -> TrainConfig:
    return config_of(init_model=LLAMA_70B, device="cuda", **LORA | values)


def planner_of(config: TrainConfig, host_gb: float) -> Planner:
    profile = load_profile("rtx4090")
    limits = Limits.of_profile(profile, int(host_gb * GB))
    return Planner(outline_of(config), profile, limits, frozenset(config.model_fields_set))


def frozen_bytes(found: Prediction) -> int:
    """Bytes of the frozen parameters, wherever they live."""
    trainable = sum(unit.trainable_numel for unit in found.costs.outline.units)
    host = sum(found.host.get(part, 0) for part in ("weights", "frozen", "packed"))
    return host + found.device.get("resident_weights", 0) - 2 * trainable


# name: settings, host GB, GB of the frozen part
MACHINES: dict[str, tuple[dict[str, Any], float, float]] = {
    "bf16 in 160 GB": ({}, 160, 141.1),
    "int8 in 96 GB": ({"base_dtype": "int8"}, 96, 76.9),
    "nf4 in 64 GB": ({"base_dtype": "nf4"}, 64, 39.5),
}


@pytest.mark.parametrize("name", MACHINES if SOAK else ["bf16 in 160 GB", "nf4 in 64 GB"])
def test_70b_is_planned_on_a_24_gb_card(name: str) -> None:
    values, host_gb, wanted = MACHINES[name]
    config = config_70b(**PINNED, **values)
    planner = planner_of(config, host_gb)
    chosen = planner.choose(config)
    found = planner.predict(chosen)
    assert planner.fits(chosen) and found.device_bytes < 24 * GB and found.host_bytes < host_gb * GB
    units = found.costs.outline.units
    assert sum(p.numel for unit in units for p in unit.parameters if not p.trainable) == FROZEN
    assert frozen_bytes(found) == pytest.approx(wanted * GB, rel=2e-3)
    assert (frozen_bytes(found) < 40 * GB) == ("base_dtype" in values and values["base_dtype"] == "nf4")
    # Moments and gradients are those of 207 M parameters, on the device; nothing is downloaded or updated.
    assert sum(unit.trainable_numel for unit in units) == 207_093_760
    assert found.device["resident_exp_avg"] == 4 * 207_093_760 and "exp_avg" not in {
        part for part, size in found.host.items() if size
    }
    assert found.lanes()["update"] == 0 and found.lanes()["download"] < 0.1 * found.seconds
    reasons = {choice.key: choice.reason for choice in explain(config, chosen, planner)}
    assert reasons["resident"].startswith("trainable parts") and found.tokens_per_second > 100


@pytest.mark.parametrize(
    ("values", "host_gb", "ways"),
    [
        ({}, 128, ["base_dtype=int8", "base_dtype=nf4"]),
        *([({"base_dtype": "int8"}, 72, ["base_dtype=nf4"])] if SOAK else []),
        ({"base_dtype": "nf4"}, 30, []),
    ],
)
def test_what_does_not_fit_is_told_of_fewer_bits(
    values: dict[str, Any], host_gb: float, ways: list[str]
) -> None:
    """With figures; and never of what the settings have already."""
    config = config_70b(**PINNED, **values)
    with pytest.raises(DoesNotFitError, match=r"host memory: a step needs .* short by") as caught:
        planner_of(config, host_gb).choose(config)
    hint = caught.value.hint or ""
    assert re.findall(r"base_dtype=\w+", hint) == ways and "adapter=" not in hint
    for way in ways:
        assert re.search(rf"{way} saves [0-9.]+ GB(;|$)", hint), hint


def test_a_full_run_that_does_not_fit_is_told_of_an_adapter() -> None:
    """70 B in full need a terabyte."""
    values = {"model_name_or_path": folder_of(LLAMA_70B), "datasets": ["none.txt"], "max_length": 2048}
    config = TrainConfig(**values, **PINNED, device="cuda", resident=0)
    planner = planner_of(config, 160)
    with pytest.raises(DoesNotFitError, match="host memory") as caught:
        planner.choose(config)
    hint = caught.value.hint or ""
    assert hint.startswith("adapter=lora saves ") and "adapter=lora base_dtype=nf4 saves" in hint
    chosen = planner.pooled(config.replace(adapter="lora", resident="auto"))
    assert planner.fits(chosen)
