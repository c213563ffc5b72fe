"""Shapes by name: small ones for a CPU, those of published models, with random weights."""

from __future__ import annotations

from typing import Any


def _llama(width: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict:
    values = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp}
    values |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    values |= {"vocab_size": vocabulary, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return values | {"tie_word_embeddings": False} | more


def _qwen3(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    shape = _llama(width, mlp, layers, heads, 8, 151936, model_type="qwen3", head_dim=128)
    return shape | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}


# The published ones have the figures of their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 256),
    "30m": _llama(512, 1408, 6, 8, 8, 8192),
    "100m": _llama(768, 2048, 12, 12, 12, 16384),
    "350m": _llama(1024, 2816, 24, 16, 16, 16384),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", rms_norm_eps=1e-6),
    "llama-3.1-8b": _llama(
        4096, 14336, 32, 32, 8, 128256, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
}


def shape(name: str, **changes: Any) -> dict[str, Any]:
    """Values of a transformers configuration. Raises KeyError for a name that is not in SHAPES."""
    return SHAPES[name] | changes
