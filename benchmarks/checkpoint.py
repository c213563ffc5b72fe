"""Cost of a checkpoint: steps during a background save, steps without one, and steps that wait for one.

One model in one process. Blocks of steps alternate, each with one checkpoint or none, and end when the
checkpoint is complete on disk: a ratio of 1.05 means 5 % lower throughput during the save. Figures are
medians of paired ratios. The cost is relative to few tokens per step (about a thousand): with more tokens
compute time grows and write time does not. Threads that wait for each other burn CPU time on a shared
machine; with --threads=1 none do, and the ratio of CPU time is that of the work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import horizon_lm as hz
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Retention
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.units import copied_buffers
from horizon_lm.checkpoint.writer import CheckpointWriter, Snapshot

from .report import Report

VOCABULARY = 8192


def model_of_34m() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


class Timed(CheckpointWriter):
    """Adds up the CPU seconds of the writing thread."""

    cpu_seconds = 0.0

    def write_unit(self, unit: int) -> None:
        before = time.thread_time()
        super().write_unit(unit)
        self.cpu_seconds += time.thread_time() - before

    def finish(self) -> None:
        before = time.thread_time()
        super().finish()
        self.cpu_seconds += time.thread_time() - before


class Bench:
    def __init__(self, update: str, dtype: str, tokens: int, micro_batches: int, folder: Path) -> None:
        limit = None if update == "eager" else 1.0
        self.model = hz.HostModel.from_pretrained(
            model_of_34m(), device="cpu", dtype=dtype, update=update, max_grad_norm=limit
        )
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(0, VOCABULARY, (1, tokens), generator=generator) for _ in range(micro_batches)]
        self.batches = [{"input_ids": i, "labels": i} for i in ids]
        self.folder, self.count = folder, 0
        self.num_bytes = 0
        self.cpu_seconds: list[float] = []

    def block(self, steps: int, save: str) -> tuple[float, float]:
        """Return wall-clock and CPU seconds of `steps` steps; save: no, background, or standing."""
        began, cpu = time.perf_counter(), time.process_time()
        writer = None
        if save != "no":
            self.count += 1
            writer = Timed(
                self.folder,
                Snapshot(
                    Manifest(self.count, self.count, {}, {}, {}),
                    self.model.store,
                    copied_buffers(self.model.skeleton.model),
                    {},
                ),
                Disk(),
                Retention(last=1),
            )
            self.model.save_state(writer, background=save == "background")
        for _ in range(steps):
            self.model.train_step(self.batches, lr=1e-5)
        self.model.finish_saving()
        seconds = time.perf_counter() - began, time.process_time() - cpu
        if writer is not None:
            assert writer.outcome is not None and writer.outcome.error is None, writer.outcome
            self.num_bytes = writer.outcome.num_bytes
            self.cpu_seconds.append(writer.cpu_seconds)
        return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--updates", nargs="+", default=["deferred", "eager", "sync"])
    parser.add_argument("--saves", nargs="+", default=["background", "standing"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    report = Report("checkpoint-cpu", __doc__ or "")
    rows = []
    for dtype in arguments.dtypes:
        for update in arguments.updates:
            with tempfile.TemporaryDirectory(prefix="horizon-") as place:
                bench = Bench(update, dtype, arguments.tokens, arguments.micro_batches, Path(place))
                bench.block(1, "background")
                ratios: dict[str, list[float]] = {}
                plain = []
                for pair in range(arguments.pairs):
                    for save in arguments.saves:
                        kinds = ("no", save) if pair % 2 else (save, "no")
                        times = {kind: bench.block(arguments.steps, kind) for kind in kinds}
                        for clock, name in enumerate(("wall", "CPU")):
                            ratio = times[save][clock] / times["no"][clock]
                            ratios.setdefault(f"{save}, {name}", []).append(ratio)
                        plain.append(times["no"][0])
                seconds = statistics.median(plain) / arguments.steps
                written = statistics.median(bench.cpu_seconds)
                for kind, found in ratios.items():
                    spread = f"{statistics.median(found):.3f} ({min(found):.2f} to {max(found):.2f})"
                    size = f"{bench.num_bytes / 1e6:.0f} MB"
                    rows.append([dtype, update, size, f"{seconds:.2f} s", f"{written:.2f} s", kind, spread])
                    print(" | ".join(rows[-1]), flush=True)
    report.table(
        [
            "dtype",
            "update",
            "checkpoint",
            "a step",
            "CPU of the disk lane",
            "save, clock",
            "with a checkpoint / without",
        ],
        rows,
        note=f"Medians of {arguments.pairs} pairs (least to most) of blocks of {arguments.steps} steps with "
        f"one checkpoint; {arguments.threads} threads; llama, 34 M parameters, {arguments.micro_batches} x "
        f"{arguments.tokens} tokens a step. The disk lane hashes and writes with the cores that train.",
    )
    report.write()


if __name__ == "__main__":
    main()
