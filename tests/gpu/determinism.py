"""Part 2: with `deterministic: true` a step gives the same bits each time, and a run the same model.

By default, what repeats and what does not is listed: it fails nothing, since nothing is promised then.
"""

from __future__ import annotations

from typing import Any

import torch

import horizon_lm as hz
from gpu.common import Gradients, Part, Place, compare, free, llama, random_batches, same
from horizon_lm.config import ModelSettings

REGIONS = ("weights", "residual", "exp_avg", "exp_avg_sq")
KINDS = ("plain", "packed", "padded")
MOST = 10  # repeats of a step, whose gradients are compared on the host
STEPS = 3
Batch = dict[str, torch.Tensor]


def check_determinism(place: Place, repeats: int = 20) -> Part:
    """repeats: of each step. Shapes are those at which atomics of many blocks meet in one sum."""
    part = Part("determinism")
    values = llama(2, 64, 128, 256, tied=True)
    if not place.dry:
        values = llama(2, 2048, 5632, 32000, tied=True, heads=32)
    experts = {"num_local_experts": 8, "output_router_logits": True}
    experts["intermediate_size"] = 128 if place.dry else 1024
    for name, config in {"llama": values, "mixtral": values | {"model_type": "mixtral"} | experts}.items():
        for asked in (False, True):
            model = _build(place, config, asked)
            for kind in KINDS[1:2] if place.dry else KINDS:
                batches = _batches(place, config, kind)
                _repeat(part, f"{name} {kind}", model, batches, min(repeats, MOST))
            del model
            free()
        _rerun(part, place, name, config)
    return part


def _build(place: Place, config: dict[str, Any], asked: bool) -> hz.HostModel:
    settings = ModelSettings(
        device=str(place.device), dtype="bfloat16", deterministic=asked, skip_memory_check=True
    )
    return hz.HostModel.from_config(config, settings)


def _batches(place: Place, config: dict[str, Any], kind: str, seed: int = 0) -> list[Batch]:
    rows, tokens = (2, 32) if place.dry else (4, 1024)
    batches = random_batches(config["vocab_size"], 2, rows, tokens, seed)
    for batch in batches:
        if kind == "packed":  # documents of many lengths
            ends = [tokens // 5, tokens // 2 - 1, tokens]
            documents = [torch.arange(end - start) for start, end in zip([0, *ends], ends, strict=False)]
            batch["position_ids"] = torch.cat(documents).expand(rows, tokens).clone()
        if kind == "padded":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1:, tokens // 3 :] = 0
            batch["labels"][1:, tokens // 3 :] = -100
    return batches


def _repeat(part: Part, name: str, model: hz.HostModel, batches: list[Batch], repeats: int) -> None:
    """The same step again and again: loss and every gradient."""
    wanted = _step(model, batches)
    apart = 0
    for _ in range(repeats - 1):
        found = _step(model, batches)
        apart += found[0] != wanted[0] or bool(compare(found[1], wanted[1]).different)
    asked = model.settings.deterministic
    label = f"{name}{', deterministic' if asked else ', default'}"
    why = "" if asked else "nothing is promised"
    part.add(label, not apart if asked else None, why, repeats=repeats, other_bits=apart)


def _step(model: hz.HostModel, batches: list[Batch]) -> tuple[float, Gradients]:
    loss = model.forward_backward(batches).loss
    return loss, {name: gradient.clone() for name, gradient in model.named_gradients()}


def _rerun(part: Part, place: Place, name: str, config: dict[str, Any]) -> None:
    """Two runs of a few steps, each with a model, engine and lanes of its own: masters and moments."""
    ended: list[dict[str, list[torch.Tensor]]] = []
    for _ in range(2):
        model = _build(place, config, True)
        for step in range(STEPS):
            model.train_step(_batches(place, config, "packed", seed=10 * step), lr=1e-3)
        model.flush()
        units, held = range(len(model.store.units)), filter(model.store.has, REGIONS)
        ended.append({region: [model.store.run(region, u).clone() for u in units] for region in held})
        del model
        free()
    one, two = ended
    apart = [r for r in one if not all(same(a, b) for a, b in zip(one[r], two[r], strict=True))]
    part.add(f"{name}: two runs, deterministic", not apart, ", ".join(apart), steps=STEPS)
