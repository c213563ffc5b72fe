"""Preference training and TRL's trainers, on the CPU.

Steps: DPO, SFT and the reference's pass take turns in one process, on one model and as many tokens. Trainers:
`horizon train`, our trainers and TRL's own, each in its process, take turns step by step on the same rows, so
that changes of the machine's speed affect all; a step is timed from the end of the one before, with data,
logging and callbacks. All recompute every layer; clipping 1.0, AdamW with fp32 masters. bfloat16 is autocast
over fp32 weights at TRL. Rows have no padding. DPOTrainer holds a reference model in memory and runs it in
each step, as is its default; ours has its log-probabilities from one pass before the first step, which is not
in these times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from horizon_lm.bench.figures import Row, spread
from horizon_lm.bench.jobs import Worker, measure
from horizon_lm.bench.models import shape, source_model, work_of
from horizon_lm.bench.protocol import Case, tokens_of
from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import TokenLoss
from horizon_lm.host_model import HostModel
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.preference.documents import sums, with_places
from horizon_lm.preference.method import Method

from .jobs import InlineWorker
from .preference_runs import make_folder
from .report import Report

STEPS = {"tiny": (1, 2), "30m": (2, 7), "100m": (2, 5)}
# What is compared -> the least ratio that is wanted.
GOALS = {
    "DPO step / SFT step": 0.95,
    "reference pass / SFT step": 2.5,
    "HorizonSFTTrainer / horizon train": 0.97,
    "HorizonSFTTrainer / SFTTrainer": 1.0,
    "HorizonDPOTrainer / DPOTrainer": 1.0,
}
HEAD = [
    "parameters",
    "dtype",
    "compared",
    "tokens/s",
    "of the other",
    "ratio (least to most)",
    "wanted",
    "met",
]
RUNS = "benchmarks.preference_runs:"
SYSTEMS = {
    "sft": {"horizon train": "horizon_train", "HorizonSFTTrainer": "ours", "SFTTrainer": "theirs"},
    "dpo": {"horizon train": "horizon_train", "HorizonDPOTrainer": "ours", "DPOTrainer": "theirs"},
}


def case_of(size: str, dtype: str, arguments: argparse.Namespace) -> Case:
    warmup, steps = STEPS[size]
    common = {"length": arguments.length, "threads": arguments.threads, "lr": 1e-5, "weight_decay": 0.0}
    count = 2 * arguments.pairs
    return Case(
        shape(size),
        sequences=count,
        rows=count,
        dtype=dtype,
        warmup=warmup,
        steps=arguments.steps or steps,
        **common,
    )


# ---- steps, in one process -------------------------------------------------------------------


def pairs_of(ids: torch.Tensor) -> MicroBatch:
    """Make a micro-batch of pairs from ids [2 * pairs, tokens]; the first quarter of each is its prompt."""
    labels, length = ids.clone(), ids.shape[1]
    labels[:, : length // 4] = -100
    documents = torch.tensor([(row, 0, length) for row in range(len(ids))])
    found = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return found | {"documents": documents, "samples": torch.arange(len(ids) // 2)}


class Steps:
    """One model, and the steps that take turns on it. Each leaves no update pending."""

    def __init__(self, case: Case) -> None:
        settings = {"device": case.device, "activations": "recompute", "max_grad_norm": case.clip}
        settings["optimizer_threads"] = case.threads
        self.case, self.number = case, 0
        self.model = HostModel.from_pretrained(source_model(case), dtype=case.dtype, **settings)
        if self.model.device.type == "cpu":
            keep_freed_memory()
        self.method = Method(TrainConfig(init_model=case.model, datasets=["none"], method="dpo"))

    def _batch(self) -> MicroBatch:
        (ids,) = tokens_of(self.case, self.number, self.case.sequences)
        self.number += 1
        return pairs_of(ids)

    def sft(self) -> None:
        batch = self._batch()
        names = ("input_ids", "labels", "attention_mask")
        self.model.train_step([{name: batch[name] for name in names}], lr=self.case.lr)
        self.model.flush()

    def dpo(self) -> None:
        reference = torch.zeros(self.case.sequences // 2, 2)
        batches, loss = self.method.step(self.model, [self._batch()], reference)
        assert isinstance(loss, TokenLoss)
        self.model.train_step(batches, lr=self.case.lr, loss_fn=loss)
        self.model.flush()

    def reference(self) -> None:
        batch = with_places(self._batch())
        out = self.model.evaluate([batch], return_log_probs=True, ignore_extra=True)
        assert out.log_probs is not None
        sums(out.log_probs[0], batch)


def seconds_of(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def take_turns(steps: Steps) -> dict[str, list[float]]:
    """Return the seconds of each kind of step; every other round runs in reversed order."""
    actions = {"sft": steps.sft, "dpo": steps.dpo, "reference": steps.reference}
    found: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(steps.case.warmup + steps.case.steps):
        order = list(actions) if number % 2 else list(reversed(actions))
        for name in order:
            found[name].append(seconds_of(actions[name]))
    return {name: values[steps.case.warmup :] for name, values in found.items()}


# ---- whole runs, each in its process ---------------------------------------------------------


def run_trainers(case: Case, method: str, *, inline: bool) -> dict[str, Row]:
    """Measure `horizon train`, our trainer and TRL's; return a row of results for each."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(case, Path(folder))
        case = case.replace(extra={"method": method, "folder": folder})
        systems = SYSTEMS[method]
        kind = InlineWorker if inline else Worker
        rows = measure([(RUNS + function, case) for function in systems.values()], kind=kind)
    return dict(zip(systems, rows, strict=True))


# ---- tables ----------------------------------------------------------------------------------


def compare(what: str, case: Case, ours: list[float], theirs: list[float]) -> list[str]:
    """Return a row of the table: medians of tokens/s, and of the ratios step by step."""
    ratios = spread([b / a for a, b in zip(ours, theirs, strict=True)])
    rates = [f"{case.tokens / statistics.median(values):,.0f}" for values in (ours, theirs)]
    wanted = GOALS[what]
    met = "yes" if ratios.median >= wanted else f"NO, {1 - ratios.median / wanted:.1%} short"
    return [*_name(case), what, *rates, ratios.text(3), f"{wanted:g}", met]


def _name(case: Case) -> list[str]:
    return [f"{work_of(case)[1] / 1e6:.0f} M", case.dtype]


def compare_runs(case: Case, rows: dict[str, Row]) -> list[list[str]]:
    found = []
    for what in GOALS:
        one, _, other = what.partition(" / ")
        if one in rows and other in rows:
            if any(rows[name].get("status") != "done" for name in (one, other)):
                whys = [f"{name}: {rows[name].get('why')}" for name in (one, other) if "why" in rows[name]]
                found.append([*_name(case), what, *whys, *[""] * (len(HEAD) - 3 - len(whys))])
            else:
                found.append(compare(what, case, rows[one]["seconds"], rows[other]["seconds"]))
    return found


def memory_of(case: Case, method: str, rows: dict[str, Row]) -> list[list[str]]:
    """Return peaks in GB of the whole process, and of the timed steps alone."""
    found = []
    for name, row in rows.items():
        if row.get("status") == "done":
            peaks = [row["peaks"]["host"], row["peaks"]["steps"]]
            rate = f"{case.tokens / statistics.median(row['seconds']):,.0f}"
            found.append([*_name(case), method, name, rate, *(f"{peak / 1e9:.2f}" for peak in peaks)])
    return found


def run_case(case: Case, arguments: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of both tables."""
    rows: list[list[str]] = []
    memory: list[list[str]] = []
    if "steps" in arguments.parts:
        found = take_turns(Steps(case))
        rows.append(compare("DPO step / SFT step", case, found["dpo"], found["sft"]))
        rows.append(compare("reference pass / SFT step", case, found["reference"], found["sft"]))
    for method in SYSTEMS if "trainers" in arguments.parts else ():
        runs = run_trainers(case, method, inline=arguments.inline)
        rows += compare_runs(case, runs)
        memory += memory_of(case, method, runs)
    print("\n".join(" | ".join(row) for row in rows), flush=True)
    return rows, memory


def fill(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Measure, and add the tables to a report; return the rows of the first."""
    rows: list[list[str]] = []
    memory: list[list[str]] = []
    try:
        for size in arguments.sizes:
            for dtype in arguments.dtypes:
                found, peaks = run_case(case_of(size, dtype, arguments), arguments)
                rows, memory = rows + found, memory + peaks
    finally:  # Ctrl-C keeps what is done
        add_tables(report, rows, memory, arguments)
    return rows


def add_tables(
    report: Report, rows: list[list[str]], memory: list[list[str]], arguments: argparse.Namespace
) -> None:
    note = (
        f"Medians; a ratio above 1 is in our favour. {arguments.threads} threads; a step has "
        f"{arguments.pairs} x 2 documents of {arguments.length} tokens, of which the last three quarters "
        "count, at SFT of the trainers all."
    )
    report.table(HEAD, rows, note=note)
    head = ["parameters", "dtype", "method", "system", "tokens/s", "peak GB, whole process", "peak GB, steps"]
    report.table(head, memory, note="VmHWM. DPOTrainer's includes its reference model.")


def summary(rows: list[list[str]]) -> list[list[str]]:
    """Return names and ratios for the table at the end of `make bench`."""
    return [[f"{row[0]}, {row[1]}: {row[2]}", f"{row[5]} speed"] for row in rows]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preference training and TRL's trainers, on the CPU.")
    parser.add_argument("--sizes", nargs="+", choices=list(STEPS), default=["30m", "100m"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--parts", nargs="+", choices=["steps", "trainers"], default=["steps", "trainers"])
    parser.add_argument("--length", type=int, default=384, help="tokens of a document")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of a step; SFT has twice as many rows")
    parser.add_argument("--steps", type=int, default=0, help="timed steps (default: by size)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(inline=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    torch.set_num_threads(arguments.threads)
    command = " ".join(["python -m benchmarks preferences", *argv])
    report = Report("preferences-cpu", __doc__ or "", command=command)
    try:
        rows = fill(report, arguments)
    finally:
        report.write()
    return int(any(row[-1].startswith("NO") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
