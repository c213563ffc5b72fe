"""LoRA steps beside full training, and beside plain PEFT with activation checkpointing, on the CPU.

The systems take turns step by step in one process, in an order that rotates, so that changes of the
machine's speed affect all; ratios are those of the steps of one turn. All have the same model, tokens,
attention (sdpa), clipping at 1.0 and AdamW with fp32 masters; adapters have rank 16 in all linear layers and
are computed in the model's dtype. `lora` and `full` are ours, recomputing every layer or (`keep`) none;
`peft` is a PeftModel in memory whose layers transformers recomputes, with torch's fused AdamW. `peft keep`
and `plain keep` are a PeftModel and the model itself in memory, recomputing nothing: what an adapter saves
where nothing is streamed. A step includes its update.

Bytes: what a store holds of frozen parameters in layers, as the planner says from the configuration alone,
and as it is allocated.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from horizon_lm.bench.figures import spread
from horizon_lm.bench.models import own, shape, source_model, work_of
from horizon_lm.bench.ours import Ours, settle
from horizon_lm.bench.plain import Plain, adam_options, backward, prepare
from horizon_lm.bench.protocol import Case, System, tokens_of
from horizon_lm.engine.policies import store_spec
from horizon_lm.host_model import HostModel
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.memory.regions import regions
from horizon_lm.model.configuration import configuration_of
from horizon_lm.plan.outline import Outline

from .report import Report

STEPS = {"tiny": (1, 2), "30m": (2, 7), "100m": (2, 7), "350m": (1, 5)}
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
# What is compared -> the least ratio that is wanted. `horizon train` keeps activations if memory allows; of
# steps that recompute all layers, the arithmetic alone is 8 to 6.
GOALS = {
    "lora keep / full keep": 1.25,
    "peft keep / plain keep": None,
    "lora keep / peft keep": None,
    "lora / full": None,
    "lora / peft": 1.0,
}
HEAD = ["parameters", "dtype", "compared", "tokens/s", "of the other", "ratio, wall (least to most)"]
HEAD += ["ratio, CPU time", "wanted", "met"]
BYTES = {"auto": 2.0, "int8": 1.1, "nf4": 0.6}
Times = dict[str, list[tuple[float, float]]]
OF_TRAINABLE = ("residual", "exp_avg", "exp_avg_sq", "grads", "grad_slabs", "sums", "sum_slabs")


class Lora(Ours):
    """Ours with an adapter, on a base with random weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        settings, self.rows, self.chosen = settle(case)
        self.model = HostModel(source_model(case), settings.replace(**LORA))
        keep_freed_memory()  # as `train` does


class Peft:
    """A PeftModel in memory, trained as its users do, but for masters in fp32."""

    def __init__(self, case: Case) -> None:
        import peft

        self.case, self.device = case, torch.device(case.device)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = own(source_model(case), case.torch_dtype, self.device)
        self.model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        prepare(model, case)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, weight_decay=case.weight_decay, **adam_options(case))

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss = backward(self.model, micro_batches, self.device)
        for master, parameter in zip(self.masters, self.trained, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.masters, self.case.clip)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.trained, strict=True):
                parameter.copy_(master)
        return loss

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def systems_of(case: Case, activations: str) -> dict[str, System]:
    case = case.replace(activations=activations)
    if activations == "keep":
        peers: dict[str, System] = {"peft keep": Peft(case), "plain keep": Plain(case)}
        return {"lora keep": Lora(case), "full keep": Ours(case), **peers}
    return {"lora": Lora(case), "full": Ours(case), "peft": Peft(case)}


def take_turns(case: Case, systems: dict[str, System]) -> tuple[Times, dict[str, float]]:
    """Return (wall and CPU seconds of each timed step, loss of the first) by system."""
    names = list(systems)
    found: Times = {name: [] for name in names}
    first: dict[str, float] = {}
    for number in range(case.warmup + case.steps):
        tokens = tokens_of(case, number, case.rows)
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = systems[name].step(tokens)
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            first.setdefault(name, loss)
    for system in systems.values():
        system.close()
    return {name: values[case.warmup :] for name, values in found.items()}, first


def compare(case: Case, what: str, found: Times) -> list[str]:
    one, _, other = what.partition(" / ")
    wall, cpu = ([b[k] / a[k] for a, b in zip(found[one], found[other], strict=True)] for k in (0, 1))
    rates = [f"{case.tokens / statistics.median(s for s, _ in found[name]):,.0f}" for name in (one, other)]
    ratio, wanted = spread(wall), GOALS[what]
    goal = ["", ""]
    if wanted is not None:
        short = 1 - ratio.median / wanted
        goal = [f"{wanted:g}", "yes" if short <= 0 else f"NO, {short:.1%} short"]
    return [*_name(case), what, *rates, ratio.text(3), spread(cpu).text(3), *goal]


def _name(case: Case) -> list[str]:
    return [f"{work_of(case)[1] / 1e6:.0f} M", case.dtype]


def run_case(case: Case) -> list[list[str]]:
    """Return the rows of the table of speed. Raises RuntimeError if the systems' first losses differ."""
    found: Times = {}
    first: dict[str, float] = {}
    for activations in ("recompute", "keep"):
        times, losses = take_turns(case, systems_of(case, activations))
        found, first = found | times, first | losses
        gc.collect()
    apart = max(first.values()) / min(first.values()) - 1
    if apart > (1e-5 if case.dtype == "float32" else 5e-3):
        raise RuntimeError(f"first losses differ by {apart:.1e}: {first}")
    rows = [compare(case, what, found) for what in GOALS]
    print("\n".join(" | ".join(row) for row in rows), flush=True)
    return rows


def bytes_row(size: str, base_dtype: str) -> list[str]:
    """Return predicted and allocated bytes of the frozen parameters of layers, per parameter."""
    case = Case(shape(size), rows=1)
    settings = settle(case)[0].replace(**LORA, base_dtype=base_dtype)
    outline = Outline(configuration_of(case.model, case.attention), settings)
    units, layers = outline.units, range(1, outline.head)
    kept = [row for row in regions(store_spec(settings, outline)) if row.name not in OF_TRAINABLE]
    planned = sum(row.numels(units)[u] * row.dtype.itemsize for row in kept for u in layers)
    with HostModel(source_model(case), settings) as model:
        names = model.store.num_bytes.keys() - set(OF_TRAINABLE)
        held = sum(model.store.run(name, u).nbytes for name in names for u in layers)
        trainable = sum(model.store.units[u].trainable_numel for u in layers)
        numel = sum(p.numel for u in layers for p in model.store.units[u].parameters if not p.trainable)
        size_of = model.store.dtype.itemsize
    each = [(total - size_of * trainable) / numel for total in (planned, held)]
    wanted = BYTES[base_dtype]
    return [*_name(case)[:1], base_dtype, *(f"{value:.3f}" for value in each), f"{wanted:g}"]


def fill(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Measure, and add the tables to a report; return the rows of the first."""
    rows: list[list[str]] = []
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            warmup, steps = STEPS[size]
            steps, common = arguments.steps or steps, {"threads": arguments.threads, "lr": 1e-4}
            common |= {"length": arguments.length, "dtype": dtype, "rows": 1}
            rows += run_case(Case(shape(size), warmup=warmup, steps=steps, **common))
    note = (
        f"Medians of the turns; a ratio above 1 is in favour of the first. {arguments.threads} threads; "
        f"a step has one row of {arguments.length} tokens. First losses are equal."
    )
    report.table(HEAD, rows, note=note)
    held = [bytes_row(size, base_dtype) for size in arguments.sizes for base_dtype in BYTES]
    print("\n".join(" | ".join(row) for row in held), flush=True)
    head = ["parameters", "base_dtype", "bytes per frozen parameter, planned", "allocated", "wanted, about"]
    report.table(head, held, note="Parameters of layers; embeddings and output layer take two bytes.")
    return rows


def summary(rows: list[list[str]]) -> list[list[str]]:
    """Return names and ratios for the table at the end of `make bench`."""
    return [[f"{row[0]}, {row[1]}: {row[2]}", f"{row[5]} speed"] for row in rows]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA beside full training and plain PEFT, on the CPU.")
    parser.add_argument("--sizes", nargs="+", choices=list(STEPS), default=["100m", "350m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=0, help="timed steps (default: by size)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    torch.set_num_threads(arguments.threads)
    report = Report("adapters-cpu", __doc__ or "", command=" ".join(["python -m benchmarks adapters", *argv]))
    rows = fill(report, arguments)
    report.write()
    return int(any(row[-1].startswith("NO") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
