"""Device memory of one layer as sequences grow: measured by torch's allocation hooks, and predicted.

A layer of width 256 (4 heads, 2 for keys and values, MLP 704) in bf16 on the CPU, one row of T tokens: peak
bytes of its forward, and of its backward with recomputation, excluding its input and the incoming gradient.
Three kinds of rows: one causal document; documents of 2048 tokens packed by position ids; a sliding window
of 1024. Also the MLP in tiles of 2048 tokens. A T x T boolean mask alone would take T * T bytes. The
exponent is the least-squares slope of log bytes over log T: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM

import horizon_lm as hz
from horizon_lm.engine.ends import forward_prologue
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.layers import Layer
from horizon_lm.plan.working_set import Built, layer_working_set

from .report import Report

WIDTH, WINDOW, DOCUMENT, TILE = 256, 1024, 2048, 2048
KINDS = ("causal", "packed", "window", "causal, MLP in tiles")


def model_of(kind: str, tokens: int) -> hz.HostModel:
    torch.manual_seed(0)
    source = MistralForCausalLM(
        MistralConfig(
            vocab_size=512,
            hidden_size=WIDTH,
            intermediate_size=704,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokens,
            sliding_window=WINDOW if kind == "window" else None,
        )
    )
    return hz.HostModel.from_pretrained(
        source, device="cpu", dtype="bfloat16", mlp_tile_tokens=TILE if "tiles" in kind else None
    )


def most_allocated(function: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes that torch's CPU allocator handed out during a call: (peak, at the end)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = found.profiler.kineto_results.events()
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most, now


def measure(model: hz.HostModel, kind: str, tokens: int) -> tuple[int, int]:
    """Return peak bytes of the first layer's forward and of its recomputing backward."""
    skeleton = model.skeleton
    ids = torch.zeros(1, tokens, dtype=torch.long)
    inputs = {"input_ids": ids}
    if kind == "packed":
        inputs["position_ids"] = torch.arange(tokens)[None] % DOCUMENT
    embeds = torch.randn(1, tokens, WIDTH).to(torch.bfloat16)
    hidden, call = forward_prologue(skeleton, None, embeds, inputs)
    layer = Layer(skeleton, 0, model.engine.ops.weight_slots.unit(0, 1), call)
    unit = model.store.units[1]
    kept: list[Any] = []
    forward, held = most_allocated(lambda: kept.append(layer.forward(hidden, policy="recompute", grad=True)))
    done = kept.pop()
    call.routers = [done.routers]
    incoming, slot = torch.randn_like(done.output), torch.empty(unit.trainable_numel)
    held -= done.output.nbytes
    graph = done.graph
    del done
    backward, _ = most_allocated(
        lambda: kept.append(layer.backward(graph, hidden, incoming, UnitGradient(unit, slot)))
    )
    return forward, backward + held


def exponent(lengths: list[int], sizes: list[int]) -> float:
    """Return the least-squares slope of log size over log length."""
    x, y = [math.log(t) for t in lengths], [math.log(s) for s in sizes]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    arguments = parser.parse_args(argv)
    report = Report("long-sequences-cpu", __doc__ or "")
    rows, fits = [], []
    for kind in KINDS:
        peaks = []
        for tokens in arguments.lengths:
            model = model_of(kind, tokens)
            forward, backward = measure(model, kind, tokens)
            built = Built(model.skeleton)
            expected = layer_working_set(lambda built=built: built, 0, 1, tokens).recomputed
            peaks.append(backward)
            cells = [kind, f"{tokens:,}", f"{forward / 1e6:.1f}", f"{backward / 1e6:.1f}"]
            cells += [f"{expected.forward.bytes / forward:.3f}", f"{expected.backward.bytes / backward:.3f}"]
            rows.append([*cells, f"{backward / tokens:,.0f}"])
            print(" | ".join(rows[-1]), flush=True)
            del model
        fits.append([kind, f"{exponent(arguments.lengths, peaks):.3f}"])
    head = ["rows", "tokens", "forward, MB", "backward, MB", "predicted / measured", "the same, backward"]
    report.table([*head, "backward bytes a token"], rows)
    report.table(["rows", "exponent of the backward's bytes over tokens"], fits)
    report.write()


if __name__ == "__main__":
    main()
