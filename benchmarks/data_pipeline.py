"""Data pipeline: loader speed relative to training, and the cost of tokenisation with and without a cache.

1. Steps of the loader (bfd and wrapped, with and without a worker thread) alternate with training steps of
   the quickstart's model in one process: tokens/s of the loader over tokens/s of training.
2. Tokenise JSONL (text, and conversations through a chat template) with one process and with one per core,
   alternating, and open the cached tokens again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import horizon_lm as hz
from horizon_lm.config import DatasetConfig, ModelSettings
from horizon_lm.data import Documents, TokenLoader, train_tokenizer
from horizon_lm.data.encode import Encoder
from horizon_lm.data.packing import make_rows
from horizon_lm.data.tokens import tokenise
from horizon_lm.machine.cores import usable_cores

from .report import Report

LENGTH = 256
MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def write_text(path: Path, megabytes: float) -> Path:
    """Write the standard library's source repeatedly, one numbered document per line."""
    texts = list(Documents([DatasetConfig(path="python-stdlib")]).texts())
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            line = json.dumps({"text": f"# {number}\n{texts[number % len(texts)][:20_000]}"}) + "\n"
            file.write(line)
            size += len(line)
            number += 1
    return path


def write_chats(path: Path, megabytes: float) -> Path:
    rng = random.Random(0)
    texts = list(Documents([DatasetConfig(path="python-stdlib")], 2_000_000).texts())
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            messages = []
            for turn in range(rng.choice((2, 2, 4))):
                text = rng.choice(texts)
                begin = rng.randrange(max(1, len(text) - 900))
                role = ("user", "assistant")[turn % 2]
                messages.append(
                    {"role": role, "content": f"{number}: {text[begin : begin + rng.randint(50, 900)]}"}
                )
            line = json.dumps({"messages": messages}) + "\n"
            file.write(line)
            size += len(line)
            number += 1
    return path


def loader_against_training(report: Report, folder: Path, tokenizer: Any, runs: int) -> None:
    path = write_chats(folder / "loader.jsonl", 4)
    encoder = Encoder(tokenizer, chat_template="plain")
    documents = Documents([DatasetConfig(path=str(path))])
    store, _ = tokenise(documents, encoder, cache_dir=None)
    model = hz.HostModel.from_config(MODEL, ModelSettings(device="cpu", dtype="float32"))
    rows = []
    for strategy in ("bfd", "wrapped"):
        numbers = np.arange(len(store.lengths))
        packed = make_rows(store, numbers, max_length=LENGTH, strategy=strategy)
        for workers in (0, 1):
            loader = TokenLoader(packed, micro_batch_size=2, seed=0, num_workers=workers)
            step = next(loader)
            model.train_step(step, lr=1e-4, max_grad_norm=1.0)
            ratios, rates = [], []
            for _ in range(runs):
                started, tokens = time.perf_counter(), 0
                for _ in range(200):
                    step = next(loader)
                    tokens += loader.size.tokens
                loading = tokens / (time.perf_counter() - started)
                started = time.perf_counter()
                model.train_step(step, lr=1e-4, max_grad_norm=1.0)
                training = loader.size.tokens / (time.perf_counter() - started)
                ratios.append(loading / training)
                rates.append((loading, training))
            loading, training = (statistics.median(rate) for rate in zip(*rates, strict=True))
            row = [strategy, str(workers), f"{loading:,.0f}", f"{training:,.0f}"]
            rows.append(
                [*row, f"{statistics.median(ratios):,.0f} ({min(ratios):,.0f} to {max(ratios):,.0f})"]
            )
            print(" | ".join(rows[-1]), flush=True)
    report.table(
        ["packing", "worker threads", "loader, tokens/s", "training, tokens/s", "loader over training"],
        rows,
        note=f"Medians of {runs} turns of 200 loaded steps and one training step (2 x {LENGTH} tokens; "
        f"llama, 19 M parameters, fp32, {torch.get_num_threads()} threads).",
    )


def tokenising(report: Report, folder: Path, tokenizer: Any, megabytes: float, runs: int) -> None:
    cores = usable_cores()
    rows = []
    sources = {"text": write_text, "conversations": write_chats}
    for name, write in sources.items():
        path = write(folder / f"{name}.jsonl", megabytes)
        size = path.stat().st_size / 1e6
        encoder = Encoder(tokenizer, chat_template="plain")
        documents = Documents([DatasetConfig(path=str(path))])
        seconds: dict[int, list[float]] = {1: [], cores: []}
        cpu: list[float] = []
        for run in range(runs):
            for num_proc in (1, cores) if run % 2 == 0 else (cores, 1):
                threads = "false" if num_proc == 1 else "true"
                os.environ["TOKENIZERS_PARALLELISM"] = threads  # one process uses one core
                begun, started = sum(os.times()[:4]), time.perf_counter()
                cache = str(folder / f"cache-{name}-{run}-{num_proc}")  # empty
                store, was_cached = tokenise(documents, encoder, cache_dir=cache, num_proc=num_proc)
                assert not was_cached
                seconds[num_proc].append(time.perf_counter() - started)
                if num_proc == cores:
                    cpu.append((sum(os.times()[:4]) - begun) / seconds[num_proc][-1])
        again = []
        for _ in range(3):
            started = time.perf_counter()
            opened, was_cached = tokenise(documents, encoder, cache_dir=cache)
            again.append(time.perf_counter() - started)
            assert was_cached and opened.fingerprint == store.fingerprint
        one, all_cores, hit = (statistics.median(v) for v in (seconds[1], seconds[cores], again))
        rows.append(
            [name, f"{size:.0f} MB", f"{len(store.ids) / 1e6:.1f} M", f"{one:.1f} s", f"{all_cores:.1f} s"]
            + [
                f"{one / all_cores:.2f}",
                f"{statistics.median(cpu):.2f}",
                f"{hit:.2f} s",
                f"{all_cores / hit:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    report.table(
        ["rows", "JSONL", "tokens", "1 process", f"{cores} processes", "faster by", "cores in use"]
        + ["opened again", "faster by"],
        rows,
        note=f"Medians of {runs} turns. Cores in use: CPU seconds of all processes over the clock's. Opening "
        "again hashes the source and the kept tokens.",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    report = Report("data-pipeline-cpu", __doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = Documents([DatasetConfig(path="python-stdlib")], 2_000_000)
        tokenizer = train_tokenizer(documents.texts(), 8192)
        loader_against_training(report, folder, tokenizer, max(5, arguments.runs))
        tokenising(report, folder, tokenizer, arguments.megabytes, arguments.runs)
    report.write()


if __name__ == "__main__":
    main()
