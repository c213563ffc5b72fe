"""Forward + backward, and the whole step, compared with plain transformers.

`recompute` is compared with transformers with activation checkpointing, `keep` without. Both models share
one process and alternate (the order too), so changes of the machine's speed affect both. Figures are
medians of paired ratios; times are the process's CPU seconds and wall-clock seconds. On the CPU: fp32 and
bf16, about 100 M parameters, sequences of 512 tokens; on a GPU: bf16, 1 B and 4 B parameters, sequences of
4096.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import horizon_lm as hz
from horizon_lm.bench.plain import checkpoint_activations

from .report import Report

# name: width, MLP, layers, heads, keys and values, vocabulary; about 110 M, 1.2 B and 4.0 B parameters
SHAPES = {
    "100m": (768, 2048, 12, 12, 12, 16384),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "4b": (2560, 9728, 36, 32, 8, 151936),
}


def model_of(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build random weights, with tied tables if these would be most of the model."""
    width, mlp, layers, heads, kv, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32768,
        tie_word_embeddings=shape != "100m",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


class Plain:
    """transformers + torch.optim.AdamW on fp32 masters, recomputing every layer or none."""

    def __init__(
        self, model: LlamaForCausalLM, micro_batches: list[dict], activations: str, device: torch.device
    ) -> None:
        self.model = model.to(device).train()
        self.micro_batches = [{k: v.to(device) for k, v in batch.items()} for batch in micro_batches]
        self.model.config.use_cache = False
        if activations == "recompute":
            checkpoint_activations(self.model)
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
    def __init__(
        self,
        model: LlamaForCausalLM,
        micro_batches: list[dict],
        device: torch.device,
        **settings: object,
    ) -> None:
        settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(device)}
        settings["optimizer_threads"] = torch.get_num_threads()
        self.model = hz.HostModel.from_pretrained(model, **settings)
        self.micro_batches = micro_batches

    def forward_backward(self) -> None:
        self.model.forward_backward(self.micro_batches)

    def step(self) -> None:
        self.model.train_step(self.micro_batches, lr=1e-5)


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours: Callable[[], None], plain: Callable[[], None], runs: int) -> dict[str, list[float]]:
    """Return sorted paired ratios plain / ours (our tokens/s over theirs), by clock."""
    for _ in range(2):  # deferred updates first touch the moments in the second step
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


def batches_of(shape: str, micro_batches: int, tokens: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[shape][-1]
    ids = [torch.randint(0, vocabulary, (1, tokens), generator=generator) for _ in range(micro_batches)]
    return [{"input_ids": i, "labels": i} for i in ids]


def row(found: dict[str, list[float]], *cells: str) -> list[str]:
    """Return cells, then median, minimum and maximum of each clock."""
    values = [f"{statistics.median(v):.3f} ({v[0]:.2f} to {v[-1]:.2f})" for v in found.values()]
    print(" | ".join([*cells, *values]), flush=True)
    return [*cells, *values]


def against_plain(case: Case, runs: int, policies: list[str], parts: list[str]) -> list[list[str]]:
    rows = []
    for activations in policies:
        model, batches = model_of(case.shape, case.dtype), case.batches()
        ours = Ours(copy.deepcopy(model), batches, case.device, activations=activations)
        plain = Plain(model, batches, activations, case.device)
        for part in parts:
            found = compare(getattr(ours, part), getattr(plain, part), runs)
            rows.append(row(found, *case.cells(), activations, part))
            ours.model.flush()
        del plain, ours
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def between_modes(case: Case, runs: int) -> list[list[str]]:
    rows = []
    for update, limit in (("deferred", 1.0), ("eager", None)):
        model, batches = model_of(case.shape, case.dtype), case.batches()
        sync = Ours(copy.deepcopy(model), batches, case.device, update="sync", max_grad_norm=limit)
        other = Ours(model, batches, case.device, update=update, max_grad_norm=limit)
        found = compare(other.step, sync.step, runs)
        rows.append(row(found, *case.cells(), update, "1.0" if limit else "off"))
        del sync, other
    return rows


@dataclass(frozen=True)
class Case:
    """One setting: a step of `micro_batches` rows of `tokens`."""

    shape: str
    dtype: torch.dtype
    micro_batches: int
    tokens: int
    device: torch.device

    def batches(self) -> list[dict]:
        return batches_of(self.shape, self.micro_batches, self.tokens)

    def cells(self) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.shape, dtype, f"{self.micro_batches} x {self.tokens}"]


def cases(device: torch.device) -> list[Case]:
    """Return the cases; on a GPU, steps of 4 K and 16 K tokens in rows of 4 K."""
    if device.type == "cuda":
        grid = [("1b", 1), ("1b", 4), ("4b", 1), ("4b", 4)]
        return [Case(shape, torch.bfloat16, count, 4096, device) for shape, count in grid]
    dtypes = (torch.float32, torch.bfloat16)
    return [Case("100m", dtype, count, 512, device) for dtype in dtypes for count in (1, 4)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--activations", nargs="+", default=["recompute", "keep"])
    parser.add_argument("--parts", nargs="+", default=["forward_backward", "step"])
    parser.add_argument("--modes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases to run; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows: list[list[str]] = []
    modes: list[list[str]] = []
    chosen = cases(device)
    for case in [chosen[k] for k in arguments.cases] if arguments.cases else chosen:
        rows += against_plain(case, arguments.runs, arguments.activations, arguments.parts)
        if arguments.modes:
            modes += between_modes(case, arguments.runs)
        write(device, rows, modes, arguments)  # after each, so a stopped run keeps its results


def write(
    device: torch.device, rows: list[list[str]], modes: list[list[str]], arguments: argparse.Namespace
) -> None:
    report = Report(f"training-step-{device.type}", __doc__ or "")
    note = f"Medians of {arguments.runs} pairs (least to most); {arguments.threads} threads. "
    head = ["shape", "dtype", "micro-batches"]
    report.table(
        [*head, "activations", "part", "our tokens/s over plain, wall", "CPU time"],
        rows,
        note=note + "step: clipping 1.0 and AdamW with fp32 masters on both sides.",
    )
    report.table(
        [*head, "update", "clipping", "tokens/s over update: sync, wall", "CPU time"],
        modes,
        note=note + "The whole step, ours against ours. On the CPU the update shares the cores with all "
        "else, so nothing can overlap.",
    )
    report.write()


if __name__ == "__main__":
    main()
