"""One decoder layer of Qwen3-4B's shape in plain transformers on this device: milliseconds, medians of five.
The forward pass builds no graph. The first compiled call includes compilation by torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

HEAD = [
    "tokens",
    "forward",
    "forward + backward",
    "compiled",
    "first call, s",
    "cuDNN attention off",
]
SHAPE = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 1024, "num_hidden_layers": 1}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
_LENGTH = 1024


def rows(device: torch.device, small: bool = False) -> list[list[str]]:
    """Return a row for each number of sequences; if compiling fails, its cell says so."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**SHAPE | ({**_SMALL, "num_key_value_heads": 2} if small else {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(device)
    counts = (4, 16, 64) if device.type == "cuda" else (1,)
    return [_row(model, count, 16 if small else _LENGTH, device, small) for count in counts]


def _row(model: Any, count: int, length: int, device: torch.device, small: bool) -> list[str]:
    width = model.config.hidden_size
    x = torch.randn(count, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    position = torch.arange(length, device=device)[None]
    known = {"position_embeddings": model.model.rotary_emb(x, position), "attention_mask": None}

    def both(layer: Callable[..., Any] = model.model.layers[0]) -> None:
        out = layer(x, position_ids=position, **known)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))

    def forward() -> None:
        with torch.no_grad():
            model.model.layers[0](x, position_ids=position, **known)

    cells = [f"{count} x {length}", _milliseconds(forward, device), _milliseconds(both, device)]
    cells += ["", ""] if small or count == 64 else _compiled(model.model.layers[0], both, device)
    if device.type != "cuda":
        return [*cells, ""]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return [*cells, _milliseconds(both, device)]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _compiled(layer: torch.nn.Module, both: Callable[..., None], device: torch.device) -> list[str]:
    """Return milliseconds of the compiled layer and seconds of its first call."""
    try:
        faster = torch.compile(layer)
        start = time.perf_counter()
        both(faster)
        _settle(device)
        first = time.perf_counter() - start
        return [_milliseconds(lambda: both(faster), device), f"{first:.0f}"]
    except Exception as error:
        return [f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}", ""]


def _milliseconds(action: Callable[[], None], device: torch.device) -> str:
    for _ in range(2):
        action()
    found = []
    for _ in range(5):
        _settle(device)
        start = time.perf_counter()
        action()
        _settle(device)
        found.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(found):.2f}"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
