"""What a checkpoint costs: steps beside which one is written, against steps without, and against a run that
stands still while it is written.

One model in one process; blocks of steps take turns, each block with one checkpoint or none, and its time ends
when the checkpoint is whole on the disk. So a ratio of 1.05 means that throughput is 5 % lower while one is
being written. Medians of paired ratios. A few thousand tokens a step are little: time for computing grows with
them, that for writing does not.
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
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.writer import CheckpointWriter
from horizon_lm.run.resume import saved_buffers

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

    def block(self, steps: int, save: str) -> float:
        """Seconds of `steps` steps; save: no, background, or standing."""
        began = time.perf_counter()
        writer = None
        if save != "no":
            self.count += 1
            writer = CheckpointWriter(
                self.folder,
                self.model.store,
                Manifest(self.count, self.count, {}, {}, {}),
                small_files={},
                buffers=saved_buffers(self.model),
                disk=Disk(),
                keep_last=1,
            )
            self.model.save_state(writer, background=save == "background")
        for _ in range(steps):
            self.model.train_step(self.batches, lr=1e-5)
        self.model.finish_saving()
        seconds = time.perf_counter() - began
        if writer is not None:
            assert writer.outcome is not None and writer.outcome.error is None, writer.outcome
            self.num_bytes = writer.outcome.num_bytes
        return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    report = Report("checkpoint-cpu", __doc__ or "", command="python -m benchmarks checkpoint")
    rows = []
    for dtype in arguments.dtypes:
        for update in ("deferred", "eager", "sync"):
            with tempfile.TemporaryDirectory(prefix="horizon-", dir=Path.cwd()) as name:
                bench = Bench(update, dtype, arguments.tokens, arguments.micro_batches, Path(name))
                bench.block(1, "background")
                ratios: dict[str, list[float]] = {"background": [], "standing": []}
                plain = []
                for pair in range(arguments.pairs):
                    for save in ("background", "standing"):
                        kinds = ("no", save) if pair % 2 else (save, "no")
                        times = {kind: bench.block(arguments.steps, kind) for kind in kinds}
                        ratios[save].append(times[save] / times["no"])
                        plain.append(times["no"])
                cells = [
                    f"{statistics.median(found):.3f} ({min(found):.2f} to {max(found):.2f})"
                    for found in ratios.values()
                ]
                seconds = statistics.median(plain) / arguments.steps
                rows.append([dtype, update, f"{bench.num_bytes / 1e6:.0f} MB", f"{seconds:.2f} s", *cells])
                print(" | ".join(rows[-1]), flush=True)
    report.table(
        [
            "dtype",
            "update",
            "checkpoint",
            "a step",
            "time beside a save / without",
            "standing still / without",
        ],
        rows,
        note=f"Medians of {arguments.pairs} pairs (least to most) of blocks of {arguments.steps} steps with one "
        f"checkpoint; {arguments.threads} threads; llama, 34 M parameters, {arguments.micro_batches} x "
        f"{arguments.tokens} tokens a step. The disk lane hashes and writes with the cores that train.",
    )
    report.write()


if __name__ == "__main__":
    main()
