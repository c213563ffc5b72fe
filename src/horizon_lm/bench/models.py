"""Models of the cases: named shapes, random weights shared by all systems, parameters and FLOPs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from horizon_lm.bench.protocol import Case
from horizon_lm.config import ModelSettings
from horizon_lm.data.collate import StepSize
from horizon_lm.model.loading import create_model
from horizon_lm.plan.outline import Outline
from horizon_lm.report.flops import UNKNOWN, ModelFlops, forward_of_layers, model_flops

_POOL = 1 << 20


def _llama(width: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict:
    values = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp}
    values |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    values |= {"vocab_size": vocabulary, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return values | {"tie_word_embeddings": False} | more


def _qwen3(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    shape = _llama(width, mlp, layers, heads, 8, 151936, model_type="qwen3", head_dim=128)
    return shape | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}


# Published models have the values of their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 256),
    "30m": _llama(512, 1408, 6, 8, 8, 8192),
    "100m": _llama(768, 2048, 12, 12, 12, 16384),
    "350m": _llama(1024, 2816, 24, 16, 16, 16384),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", rms_norm_eps=1e-6),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, 152064, model_type="qwen2", rms_norm_eps=1e-6),
    "qwen3-30b-a3b": _qwen3(2048, 6144, 48, 32)
    | {"model_type": "qwen3_moe", "num_key_value_heads": 4, "tie_word_embeddings": False}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "llama-3.1-8b": _llama(
        4096, 14336, 32, 32, 8, 128256, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
}


def shape(name: str, **changes: Any) -> dict[str, Any]:
    """Return values of a transformers configuration. Raises KeyError for a name that is not in SHAPES."""
    return SHAPES[name] | changes


def source_model(case: Case) -> nn.Module:
    """Create a transformers model on the CPU, with random weights drawn from the case's seed.

    init=transformers: fp32 parameters. init=quick: overlapping views, in the case's dtype, of one small pool
    of random numbers, so that a model of any size takes no time or memory until a system copies it (`own`).
    """
    if case.init == "transformers":
        return create_model(
            case.model, dtype=case.torch_dtype, seed=case.seed, attn_implementation=case.attention
        )
    model = _hollow(case)
    generator = torch.Generator().manual_seed(case.seed)
    std = float(getattr(model.config, "initializer_range", 0.02) or 0.02)
    pool = (torch.randn(_POOL, generator=generator) * std).to(case.torch_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = _view(pool, name, parameter.shape)
    return model


def _hollow(case: Case) -> nn.Module:
    """Create a model whose parameters have addresses but no pages yet; its buffers are real."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    values = dict(case.model)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=case.torch_dtype, attn_implementation=case.attention
        )
    model.tie_weights()
    return model


def _view(pool: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    """Return ones for norm scales, zeros for biases, else rows at different offsets of the pool."""
    if len(shape) == 1:
        value = torch.zeros if name.endswith("bias") else torch.ones
        return value(tuple(shape), dtype=pool.dtype)
    begin = sum(name.encode()) * 7919 % 4096
    apart = max(0, (len(pool) - begin - shape[-1]) // math.prod(shape[:-1]))
    strides = [apart * math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
    return pool.as_strided(tuple(shape), (*strides, 1), begin)


def own(model: nn.Module, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Copy each parameter to its own contiguous memory, in `dtype` on `device`; buffers follow."""
    for parameter in model.parameters():
        kind = dtype or parameter.dtype
        parameter.data = torch.empty(parameter.shape, dtype=kind, device=device).copy_(parameter.data)
    return model.to(device)


@dataclass(frozen=True)
class Work:
    """FLOPs of a model. model: forward and backward; layers: one forward pass through all layers."""

    model: ModelFlops
    layers: ModelFlops

    def model_flops(self, sequences: int, length: int) -> float:
        """Return the model FLOPs of a step of `sequences` x `length` tokens."""
        return self.model.of(_step(sequences, length))

    def hardware_flops(self, sequences: int, length: int, recomputed: float) -> float:
        """Add recomputed forward passes. recomputed: share of the layers that run forward twice, 0 to 1."""
        step = _step(sequences, length)
        return self.model.of(step) + recomputed * self.layers.of(step)


def _step(sequences: int, length: int) -> StepSize:
    return StepSize(sequences * length, sequences * length, (length,) * sequences)


@lru_cache(maxsize=64)
def _work(model_json: str) -> tuple[Work, int]:
    from transformers import AutoConfig

    values = json.loads(model_json)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    outline = Outline(config, ModelSettings(device="cpu"))
    counted = outline.count()
    if counted is None:
        return Work(UNKNOWN, UNKNOWN), outline.num_parameters
    model = model_flops(outline.units, counted, embedding_trainable=True)
    return Work(model, forward_of_layers(outline.units, counted)), outline.num_parameters


def work_of(case: Case) -> tuple[Work, int]:
    """Return (FLOPs of a case's model, number of parameters) without allocating anything."""
    return _work(json.dumps(case.model, sort_keys=True))
