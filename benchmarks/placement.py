"""Resident units and rounds, simulated: each alone and both, next to in-memory training.

Every figure is **simulated**, not measured: the engine's schedule with the rates of the shipped profile
`h200-1.5tb`, whose sources say which rates are measurements by others, which are data-sheet peaks, and what
is unknown. Kernel launches, memory contention between lanes and fragmentation are ignored, so times are
lower bounds.

bf16, fp32 masters and moments, clipping at 1.0, sequences of 1024 tokens without padding. The planner splits
the step and chooses everything that a row does not fix:

| choices | resident | rounds | activations |
| --- | --- | --- | --- |
| streamed | 0 | 1 | recompute or keep, by layer |
| residents | auto | 1 | auto |
| rounds | 0 | auto | auto |
| both | auto | auto | auto |

Columns:

- `/ same arithmetic`: tokens/s over those of an in-memory run with the same micro-batches, rounds and
  activation policies, and so the same products. All units are resident, their updates run on the device, and
  device memory is unlimited. The difference from 1 is what streaming costs. It can exceed 1 slightly:
  updates on the host run beside compute, those on the device compete with it.
- `/ best in memory`: tokens/s over those of the fastest in-memory run that fits the device: all units are
  resident, and the planner chooses the rest. Gradients that several micro-batches add to are fp32 and take
  4 bytes per parameter more. `-`: none fits. Above 1, the streamed run is the faster one, because it has more
  room for activations.
- executed: FLOPs per token of all matrix products that a step executes (forward, loss, recomputation,
  backward; products with weights only, so not those of attention) / N. N: parameters that multiply a token,
  as in MFU (docs/performance.md). 6 recomputes nothing, about 8 all layers.
- MFU: (6 N tokens + 6 L d sum of squared lengths) / seconds / 989 TFLOP/s.
- layers: policies from the first layer up; residents: their number, and what they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

from horizon_lm.bench.figures import PEAKS
from horizon_lm.bench.models import shape, work_of
from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.config import TrainConfig
from horizon_lm.engine.homes import resident_order
from horizon_lm.errors import DoesNotFitError
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.predict import Prediction
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.plan.work import MATMUL
from horizon_lm.words import count

from .report import Report

HARDWARE, PEAK = "h200-1.5tb", PEAKS["H200"]
LENGTH = 1024
# Shapes, and sequences per step.
STEPS = (
    ("qwen3-4b", (4, 16, 64)),
    ("qwen2.5-7b", (16, 148, 512)),
    ("qwen2.5-14b", (512,)),
    ("qwen3-30b-a3b", (64,)),
)
CHOICES: dict[str, dict[str, Any]] = {
    "streamed": {"resident": 0, "rounds": 1},
    "residents": {"resident": "auto", "rounds": 1},
    "rounds": {"resident": 0, "rounds": "auto"},
    "both": {"resident": "auto", "rounds": "auto"},
}
HEAD = ["choices", "tokens/s", "/ same arithmetic", "/ best in memory", "executed, N", "MFU", "host GB"]
HEAD += ["device GB", "step", "layers", "residents", "busiest lane"]
GOALS = ["goal", "wanted", "simulated", "reached"]


@dataclass(frozen=True)
class Found:
    """A planned step and its in-memory references, tokens/s; None: none fits the device."""

    case: Case
    choices: str
    plan: RunPlan
    same_arithmetic: float
    best_in_memory: float | None

    @property
    def rate(self) -> float:
        return self.plan.prediction.tokens_per_second

    @property
    def practicality(self) -> float:
        return self.rate / self.same_arithmetic

    @property
    def executed(self) -> float:
        """FLOPs per token of all matrix products, in units of N."""
        work, _ = work_of(self.case)
        return 6 * executed_flops(self.plan.prediction) / (self.case.tokens * work.model.per_token)

    @property
    def mfu(self) -> float:
        work, _ = work_of(self.case)
        return work.model_flops(self.case.sequences, LENGTH) / self.plan.prediction.seconds / PEAK

    def cells(self) -> list[str]:
        found = self.plan.prediction
        return [
            self.choices,
            f"{self.rate:,.0f}",
            f"{self.practicality:.3f}",
            f"{self.rate / self.best_in_memory:.3f}" if self.best_in_memory else "-",
            f"{self.executed:.2f}",
            f"{self.mfu:.1%}",
            f"{found.host_bytes / 1e9:,.0f}",
            f"{found.device_bytes / 1e9:,.0f}",
            step_in_words(found),
            layers_in_words(found),
            residents_in_words(found),
            found.limit(),
        ]


def case_of(model: str, sequences: int) -> Case:
    return Case(shape(model), LENGTH, sequences, rows=0, device="cuda", activations="auto")


def simulate(model: str, sequences: int, cache: OutlineCache) -> Iterator[Found]:
    """Plan one step with each of CHOICES."""
    case = case_of(model, sequences)
    best = best_in_memory(case, cache)
    for choices in CHOICES:
        plan = plan_of(case, choices, cache)
        yield Found(case, choices, plan, same_arithmetic(plan), best)


def plan_of(case: Case, choices: str, cache: OutlineCache) -> RunPlan:
    config = train_config(case).replace(**CHOICES[choices])
    if choices != "streamed":
        return plan_run(config, HARDWARE, cache=cache)
    return recomputing_or_keeping(config, int(case.model["num_hidden_layers"]), cache)


def recomputing_or_keeping(config: TrainConfig, layers: int, cache: OutlineCache) -> RunPlan:
    """Plan a step whose layers recompute or keep: the fastest of none, half and all that can."""

    @lru_cache
    def keeping(kept: int) -> RunPlan | None:
        words = {"recompute": layers - kept, "keep": kept}
        policies = [f"{word}*{number}" for word, number in words.items() if number]
        try:
            return plan_run(config.replace(activations=policies), HARDWARE, cache=cache)
        except DoesNotFitError:
            return None

    most = bisect_left(range(1, layers + 1), True, key=lambda kept: keeping(kept) is None)
    plans = [plan for plan in map(keeping, (0, most // 2, most)) if plan is not None]
    if not plans:
        return plan_run(
            config.replace(activations="recompute"), HARDWARE, cache=cache
        )  # raises the shortfall
    return min(plans, key=lambda plan: plan.prediction.seconds)


def in_memory(config: TrainConfig, units: int) -> TrainConfig:
    return config.replace(resident=units, boundaries="device", round_sums="device")


def same_arithmetic(plan: RunPlan) -> float:
    """Return tokens/s of the in-memory run that executes the plan's products, memory unlimited."""
    units = len(resident_order(plan.planner.outline))
    return plan.planner.predict(in_memory(plan.config, units)).tokens_per_second


def best_in_memory(case: Case, cache: OutlineCache) -> float | None:
    """Return tokens/s of the fastest in-memory run that fits the device."""
    units = int(case.model["num_hidden_layers"]) + 2 - bool(case.model["tie_word_embeddings"])
    try:
        plan = plan_run(in_memory(train_config(case), units), HARDWARE, cache=cache)
    except DoesNotFitError:
        return None
    return plan.prediction.tokens_per_second


def executed_flops(found: Prediction) -> int:
    """Return the FLOPs of all matrix products of a step."""
    costs = found.costs
    works = (costs.work_of(op) for op, _, _ in found.simulation.spans if op.kind in "FBCLE")
    return sum(kernel.flops * n for work in works for kernel, n in work.items() if kernel.kind == MATMUL)


# ---- in words ---------------------------------------------------------------------------------


def step_in_words(found: Prediction) -> str:
    spec = found.plan
    cut = f"{spec.micro_batches} x {found.batch}"
    if spec.rounds == 1:
        return cut
    return f"{cut} in {spec.rounds} rounds, sums: {spec.sums}"


def layers_in_words(found: Prediction) -> str:
    """Name the policies from the first layer up."""
    spec = found.plan
    runs = [(word, len(list(run))) for word, run in groupby(spec.policy(u) for u in range(1, spec.head))]
    words = ", ".join(f"{word} {number}" for word, number in runs)
    spilled = sum(spec.is_spilled(u) for u in range(1, spec.head))
    return words + (f"; {count(spilled, 'input')} on the host" if spilled else "")


def residents_in_words(found: Prediction) -> str:
    spec = found.plan
    units = spec.resident
    if not units:
        return "none"
    layers = sorted(u for u in units if 0 < u < spec.head)
    names = {
        spec.embedding_unit: "table",
        spec.head: "table and head" if spec.tied else "head",
        0: "prologue",
    }
    words = [name for unit, name in names.items() if unit in units]
    if layers:
        words.append(f"{len(layers)} of {spec.layers} layers")
    return ", ".join(words)


# ---- tables -----------------------------------------------------------------------------------


def goals(found: list[Found]) -> list[list[str]]:
    """Return a row for each goal whose step was simulated."""
    rows: list[list[str]] = []
    for one in (one for one in found if one.choices == "both"):
        model, sequences = one.case.model, one.case.sequences
        if model == shape("qwen3-4b") and sequences == 16:
            reached = one.practicality >= 0.98
            rows.append(["/ same arithmetic, Qwen3-4B, 16k", ">= 0.98", f"{one.practicality:.3f}"])
        elif sequences == 512:
            name = "Qwen2.5-7B" if model == shape("qwen2.5-7b") else "Qwen2.5-14B"
            reached = one.executed <= 6.3
            rows.append([f"executed, {name}, 512k", "<= 6.3 N", f"{one.executed:.2f} N"])
        else:
            continue
        rows[-1].append("yes" if reached else "no")
    return rows


def fill(report: Report, most: int | None = None) -> list[Found]:
    """Simulate, and add the tables to a report. most: number of steps, all by default."""
    found: list[Found] = []
    steps = [(model, sequences) for model, several in STEPS for sequences in several]
    caches = {model: OutlineCache() for model, _ in STEPS}
    for model, sequences in islice(steps, most):
        report.section(f"{model}, {sequences} x {LENGTH} tokens a step")
        mine = []
        for one in simulate(model, sequences, caches[model]):
            mine.append(one)
            print(model, sequences, " | ".join(one.cells()), flush=True)
        report.table(HEAD, [one.cells() for one in mine], note=f"Simulated with the profile {HARDWARE}.")
        found += mine
    report.section("Goals")
    report.table(GOALS, goals(found), note="Simulated; nothing in this file was run on a GPU.")
    return found
