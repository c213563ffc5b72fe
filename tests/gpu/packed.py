"""Part 8: packed weights are unpacked on the device as on the CPU, and gradients are those of the unpacked
weights, to the bit."""

from __future__ import annotations

from typing import Any

import torch

import horizon_lm as hz
from gpu.common import Gradients, Part, Place, free, llama, random_batches, same
from horizon_lm.config import ModelSettings
from horizon_lm.errors import ConfigError
from horizon_lm.memory import packed

NUMEL = 1 << 22
FROZEN = ["mlp", "q_proj"]


def check_packed(place: Place) -> Part:
    part = Part("packed")
    try:
        packed.check_installed("nf4")
    except ConfigError as error:
        part.add("packed weights", None, str(error))
        return part
    numel = NUMEL >> 8 if place.dry else NUMEL
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = llama(2, 64, 128, 256, tied=True)
    if not place.dry:
        config = llama(2, 2048, 5632, 32000, tied=True, heads=32)
    for kind in packed.FORMATS:
        stored = torch.zeros(packed.packed_bytes(numel, kind), dtype=torch.uint8)
        packed.pack(values, stored, kind, place.device)
        here, there = torch.empty_like(values), torch.empty_like(values, device=place.device)
        packed.unpack(stored, numel, kind, here)
        packed.unpack(stored.to(place.device), numel, kind, there)
        part.add(f"{kind}: values as on the CPU", torch.equal(here, there.cpu()))
        model = _model(place, config, base_dtype=kind, resident="trainable")
        found, wanted = _gradients(place, model, config), dict(model.named_parameters())
        del model
        plain = _model(place, config)
        for name, value in wanted.items():
            plain.store.adopt(name, value)
        expected = _gradients(place, plain, config)
        equal = found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
        part.add(f"{kind}: gradients", equal)
        del plain
        free()
    return part


def _model(place: Place, config: dict[str, Any], **settings: Any) -> hz.HostModel:
    given = {"device": str(place.device), "dtype": "bfloat16", "deterministic": True, "freeze": FROZEN}
    return hz.HostModel.from_config(config, ModelSettings(**(given | settings), skip_memory_check=True))


def _gradients(place: Place, model: hz.HostModel, config: dict[str, Any]) -> Gradients:
    rows, tokens = (2, 32) if place.dry else (2, 1024)
    model.forward_backward(random_batches(config["vocab_size"], 2, rows, tokens, 0))
    return {name: value.cpu().clone() for name, value in model.named_gradients()}
