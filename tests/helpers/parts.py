"""Models with an adapter on a frozen base, packed or not, and what some of their steps compute."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained

MICRO_BATCHES = (2, 3, 1)  # of each step
# An untied table; a tied one, learned positions, biases and GPT-2's Conv1D; fused experts and their loss;
# fp32 parameters in a bf16 model.
MODELS = ("llama", "gpt2", "mixtral-aux", "flint")
LORA = {"adapter": "lora", "lora_r": 4, "target_modules": r".*(_proj|c_attn|c_fc|c_proj)$"}
Bits = dict[str, torch.Tensor]


@cache
def _built(name: str, layers: int) -> Any:
    config = zoo.CASES[name].config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    made = zoo._from_config(config, torch.float32, seed=0, attn=_attention(name))
    zoo._perturb(made, torch.Generator().manual_seed(1))
    return made.train()


def _attention(name: str) -> str:
    return "eager" if zoo.CASES[name].attn == "eager" else "sdpa"


def source(name: str, layers: int = 3) -> Any:
    """A new model. (A deep copy would share buffers that models change.)"""
    made = zoo._from_config(_built(name, layers).config, torch.float32, seed=0, attn=_attention(name))
    made.load_state_dict(_built(name, layers).state_dict())
    return made.train()


def host(name: str, values: Bits | None = None, **settings: Any) -> hz.HostModel:
    """A model of three layers with an adapter, unless the settings say `adapter: none`. values: of the base,
    by the names without an adapter."""
    made = source(name)
    if values is not None:
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                parameter.copy_(values[key])
    given = {"device": "cpu", "dtype": "bfloat16", "skip_memory_check": True, "loss_chunk_tokens": 8}
    if (
        name.startswith("mixtral") and "adapter" not in settings
    ):  # whose experts PEFT would take for linear layers
        given["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = {} if settings.get("adapter") == "none" else LORA
    return from_pretrained(made, **(adapter | given | settings))


def base_values(model: hz.HostModel) -> Bits:
    """The frozen weights as they are computed with, by the names without an adapter."""
    named = model.named_parameters()
    return {name.replace("base_layer.", ""): value for name, value in named if "lora_" not in name}


@cache
def dequantised(name: str, kind: str, dtype: str) -> Bits:
    return base_values(host(name, base_dtype=kind, dtype=dtype))


def batches(name: str, step: int, count: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=9, seed=100 * step + m + 1) for m in range(count)]


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone().contiguous().view(torch.uint8)


def trained(model: hz.HostModel, name: str) -> tuple[list[float], Bits]:
    """Losses, norms and an evaluation of three steps; masters, and gradients of a fourth step."""
    numbers: list[float] = []
    for step, count in enumerate(MICRO_BATCHES):
        out = model.train_step(batches(name, step, count), lr=1e-2, weight_decay=0.1)
        numbers += [out.loss, out.grad_norm, *out.router_losses]
        if step == 1:
            numbers.append(model.evaluate(batches(name, 50, 2)).loss)
    found = {key: bits(value) for key, value in model.named_parameters()}
    if model.settings.update_mode != "eager":
        numbers.append(model.forward_backward(batches(name, 60, 3)).loss)
        found |= {f"gradient of {key}": bits(value.cpu()) for key, value in model.named_gradients()}
    return numbers, found


def differences(one: tuple[list[float], Bits], two: tuple[list[float], Bits]) -> list[str]:
    """Where two outcomes differ; one of eager updates has no gradients to compare."""
    found = [f"number {i}" for i, (a, b) in enumerate(zip(one[0], two[0], strict=False)) if a != b]
    both = one[1].keys() & two[1].keys()
    assert all(key.startswith("gradient of") for key in one[1].keys() ^ two[1].keys())
    return found + [key for key in sorted(both) if not torch.equal(one[1][key], two[1][key])]


def sampled(rng: random.Random, clips: bool) -> dict[str, Any]:
    """Random settings that change no bit."""
    words = ["recompute", "attention", "products", "keep"]
    rounds = rng.choice([1, 1, 2, 3])
    return {
        "resident": rng.choice([0, 2, "trainable", "trainable", ["trainable", "head"], ["layer 1"]]),
        "update": rng.choice(["sync", "deferred"] if clips else ["eager", "sync", "deferred"]),
        "max_grad_norm": 1.0 if clips else None,
        "activations": rng.choice([*words, [rng.choice(words) for _ in range(3)]]),
        "boundaries": rng.choice(["device", "host", ["host", "device*2"]]),
        "checkpoint_interval": rng.choice([1, 1, 2]),
        "rounds": rounds,
        "round_sums": rng.choice(["device", "host", *["add"] * (rounds == 3)]),
        "slots": rng.choice([2, 3]),
        "grad_slots": rng.choice([1, 2]),
        "lanes": rng.choice(["inline", "adversarial", "adversarial"]),
    }
