"""Frozen weights in few bits on the CPU: host bytes per parameter, the time that unpacking adds to a layer's
forward pass, and the perplexity of a model whose linear weights are packed."""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from horizon_lm import HostModel
from horizon_lm.engine.lanes import InlineLanes
from horizon_lm.memory.packed import packed_bytes

from .report import Report

KINDS = ("auto", "int8", "nf4")
# Layers of the two models of `make bench`, and of Qwen3-4B.
SHAPES: dict[str, dict[str, int]] = {
    "110 M": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "342 M": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
}
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 16, "skip_memory_check": True, "device": "cpu"}
LENGTH = 256  # tokens of a row of text, as in training


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks low_bit", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of the forward pass")
    parser.add_argument("--passes", type=int, default=7, help="of each model, of which the median counts")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--model", type=Path, help="a trained model, such as runs/quickstart/model")
    parser.add_argument("--rows", type=int, default=64, help="of 256 tokens, for the perplexity")
    arguments = parser.parse_args(argv)
    report = Report("low-bit-cpu", __doc__ or "")
    report.section("Bytes and time")
    report.table(
        ["layer", "dtype", "base", "bytes per parameter", "forward", "unpack", "share"],
        [row for shape in arguments.shapes for row in times(shape, arguments.tokens, arguments.passes)],
        note=f"A layer with an adapter on {arguments.tokens:,} tokens: milliseconds of CPU time (the machine "
        f"was shared), {torch.get_num_threads()} threads, medians of {arguments.passes} evaluations of two "
        "layers. Bytes are those of packed weights, scales included.",
    )
    if arguments.model is not None:
        report.section("Perplexity")
        report.table(
            ["base", "loss", "perplexity", "host bytes of the frozen part"],
            list(perplexities(arguments.model, arguments.rows)),
            note=f"{arguments.rows} rows of {LENGTH} tokens of the standard library's tests, which the "
            "quickstart does not train on; bfloat16, the adapter new and without effect.",
        )
    report.write()
    return 0


def times(shape: str, tokens: int, passes: int) -> Iterator[list[str]]:
    """A row for each dtype and format. Evaluations of all of them alternate."""
    for dtype in ("bfloat16", "float32"):
        models = {kind: _model(shape, dtype, kind, tokens) for kind in KINDS}
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
        for _ in range(passes + 1):
            for kind, model in models.items():
                model.evaluate([{"input_ids": ids, "labels": ids}], record=True)
                found[kind].append(_spans(model))
        for kind, model in models.items():
            forward, unpack = (statistics.median(one) * 1e3 for one in zip(*found[kind][1:], strict=True))
            numel = model.store.units[1].packed_numel
            size = packed_bytes(numel, kind) / numel if numel else model.store.dtype.itemsize
            row = [shape, dtype, kind, f"{size:.3f}", f"{forward:.1f}"]
            yield row + ([f"{unpack:.1f}", f"{unpack / forward:.1%}"] if numel else ["", ""])
        for model in models.values():
            model.close()


def _model(shape: str, dtype: str, kind: str, tokens: int) -> HostModel:
    sizes: dict[str, Any] = {"model_type": "llama", "vocab_size": 256, "num_hidden_layers": 2}
    sizes |= SHAPES[shape] | {"num_key_value_heads": 8, "max_position_embeddings": tokens}
    if sizes["num_attention_heads"] % 8:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    model = HostModel.from_config(sizes, dtype=dtype, base_dtype=kind, **LORA)
    model.engine.lanes = InlineLanes(clock=time.process_time)
    return model


def _spans(model: HostModel) -> tuple[float, float]:
    """Seconds of a layer's forward pass, and of unpacking it."""
    by_kind: dict[str, list[float]] = {"F": [], "Q": [0.0]}
    for op, start, end in model.timeline:
        if op.kind in by_kind and op.unit:
            by_kind[op.kind].append(end - start)
    return statistics.mean(by_kind["F"]), statistics.mean(by_kind["Q"][1:] or [0.0])


def perplexities(folder: Path, rows: int) -> Iterator[list[str]]:
    """A row for each format, of the same text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_text(8 * LENGTH * rows), return_tensors="pt")["input_ids"][0][: rows * LENGTH]
    batches = [{"input_ids": one, "labels": one} for one in ids.view(-1, LENGTH).split(8)]
    for kind in KINDS:
        model = HostModel.from_pretrained(folder, dtype="bfloat16", base_dtype=kind, **LORA)
        loss = model.evaluate(batches).loss
        frozen = model.store.num_bytes.get("packed", 0)
        if not frozen:
            layers = range(1, model.skeleton.head)
            weights = [p for u in layers for p in model.store.units[u].parameters if len(p.shape) > 1]
            frozen = sum(p.numel for p in weights if not p.trainable) * model.store.dtype.itemsize
        yield [kind, f"{loss:.4f}", f"{math.exp(loss):.3f}", f"{frozen:,}"]
        model.close()


def _text(characters: int) -> str:
    """The first files of the standard library's own tests."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    found = ""
    for path in sorted(folder.glob("test_*.py")):
        found += path.read_text(encoding="utf-8", errors="ignore")
        if len(found) > characters:
            break
    return found


if __name__ == "__main__":
    main()
