"""Forward + backward, and the whole step, against plain transformers.

`recompute` stands beside transformers with activation checkpointing, `keep` beside transformers without.
Both models live in one process and take turns (order alternating), so that a machine that changes
its speed changes it for both. Figures are medians of paired ratios; times are of the process's CPU
seconds and of the wall clock. fp32 and bf16, about 100 M parameters, sequences of 512 tokens.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import horizon_lm as hz

from .report import Report

TOKENS = 512


def model_of_100m() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16384,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


class Plain:
    """transformers + torch.optim.AdamW on fp32 masters, recomputing every layer or none."""

    def __init__(self, model: LlamaForCausalLM, micro_batches: list[dict], activations: str) -> None:
        self.model, self.micro_batches = model.train(), micro_batches
        self.model.config.use_cache = False
        if activations == "recompute":
            self.model.activation_checkpointing_enable()
        self.is_bf16 = model.dtype == torch.bfloat16
        parameters = list(model.parameters())
        self.masters = (
            [p.detach().float().requires_grad_() for p in parameters] if self.is_bf16 else parameters
        )
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0.0, fused=True)

    def forward_backward(self) -> None:
        self.model.zero_grad(set_to_none=True)
        count = len(self.micro_batches)
        for batch in self.micro_batches:
            (self.model(**batch).loss / count).backward()

    def step(self) -> None:
        self.forward_backward()
        if self.is_bf16:
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        if self.is_bf16:
            with torch.no_grad():
                for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                    parameter.copy_(master)


class Ours:
    def __init__(self, model: LlamaForCausalLM, micro_batches: list[dict], **settings: object) -> None:
        dtype = str(model.dtype).removeprefix("torch.")
        self.model = hz.HostModel.from_pretrained(model, device="cpu", dtype=dtype, **settings)
        self.micro_batches = micro_batches

    def forward_backward(self) -> None:
        self.model.forward_backward(self.micro_batches)

    def step(self) -> None:
        self.model.train_step(self.micro_batches, lr=1e-5)


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours: Callable[[], None], plain: Callable[[], None], runs: int) -> dict[str, list[float]]:
    """Paired ratios plain / ours (that is, our tokens/s over theirs), by clock, sorted."""
    plain(), ours()
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for i in range(runs):
        if i % 2:
            theirs, mine = seconds(plain), seconds(ours)
        else:
            mine, theirs = seconds(ours), seconds(plain)
        ratios["wall"].append(theirs[0] / mine[0])
        ratios["cpu"].append(theirs[1] / mine[1])
    return {clock: sorted(values) for clock, values in ratios.items()}


def batches_of(micro_batches: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 16384, (1, TOKENS), generator=generator) for _ in range(micro_batches)]
    return [{"input_ids": i, "labels": i} for i in ids]


def row(found: dict[str, list[float]], *cells: str) -> list[str]:
    """Cells, then median, least and most of each clock."""
    values = [f"{statistics.median(v):.3f} ({v[0]:.2f} to {v[-1]:.2f})" for v in found.values()]
    print(" | ".join([*cells, *values]), flush=True)
    return [*cells, *values]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    report = Report("training-step-cpu", __doc__ or "", command="python -m benchmarks training_step")
    rows, modes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for micro_batches in arguments.micro_batches:
            batches, model = batches_of(micro_batches), model_of_100m().to(dtype)
            for activations in ("recompute", "keep"):
                plain = Plain(copy.deepcopy(model), batches, activations)
                ours = Ours(copy.deepcopy(model), batches, activations=activations)
                for part in ("forward_backward", "step"):
                    found = compare(getattr(ours, part), getattr(plain, part), arguments.runs)
                    rows.append(row(found, name, activations, str(micro_batches), part))
                    ours.model.flush()
                del plain, ours
            for update, limit in (("deferred", 1.0), ("deferred", None), ("eager", None)):
                sync = Ours(copy.deepcopy(model), batches, update="sync", max_grad_norm=limit)
                other = Ours(copy.deepcopy(model), batches, update=update, max_grad_norm=limit)
                found = compare(other.step, sync.step, arguments.runs)
                modes.append(row(found, name, str(micro_batches), update, "1.0" if limit else "off"))
                del sync, other
    size = f"{arguments.threads} threads; llama, 110 M parameters, {TOKENS} tokens a micro-batch. "
    pairs = f"Medians of {arguments.runs} pairs (least to most); "
    report.table(
        ["dtype", "activations", "micro-batches", "part", "our tokens/s over plain, wall", "CPU time"],
        rows,
        note=pairs + size + "step: clipping 1.0 and AdamW with fp32 masters on both sides.",
    )
    report.table(
        ["dtype", "micro-batches", "update", "clipping", "tokens/s over update: sync, wall", "CPU time"],
        modes,
        note=pairs + "the whole step, ours against ours. On the CPU the update shares the cores with all "
        "else, so nothing can overlap.",
    )
    report.write()


if __name__ == "__main__":
    main()
