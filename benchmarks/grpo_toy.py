"""GRPO learns a task with a verifiable reward: write the letter of the prompt four times.

A llama of 2 layers with random weights, streamed by HorizonGRPOTrainer, which generates with transformers.
The reward is the share of the four places with the right letter.
"""

from __future__ import annotations

import argparse
import random
import resource
import string
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig

from horizon_lm.trainers import HorizonGRPOTrainer

from .report import Report

ROOT = Path(__file__).parent.parent
LETTERS = string.ascii_lowercase[:16]
TIMES = 4


class Curve(NamedTuple):
    """Mean reward and entropy (nats) of each step's completions; wall and CPU seconds of the training."""

    rewards: list[float]
    entropies: list[float]
    seconds: float
    cpu_seconds: float


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", ":", *LETTERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    vocabulary = {"vocab_size": 3 + len(LETTERS), "tie_word_embeddings": True, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, **vocabulary))


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the share of the places that have the prompt's letter."""
    return [
        completion.count(prompt[0]) / TIMES for prompt, completion in zip(prompts, completions, strict=True)
    ]


def learn(steps: int, seed: int = 0) -> Curve:
    """Train on 64 completions a step, 8 of each prompt."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=TIMES,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            adam_beta2=0.99,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = HorizonGRPOTrainer(
            model=model(seed),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [rng.choice(LETTERS) + ":" for _ in range(1024)]}),
            processing_class=tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        started, cpu = time.perf_counter(), _cpu_seconds()
        trainer.train()
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return Curve([line["reward"] for line in lines], [line["entropy"] for line in lines], seconds, cpu)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def draw(curve: Curve, picture: Path) -> None:
    """Draw the mean reward of each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(curve.rewards) + 1), curve.rewards, color="#1f5fa8", lw=1.5)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step (64 completions)")
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="also draw the curve in this file (svg, png)")
    arguments = parser.parse_args(argv)
    report = Report("grpo-toy-cpu", __doc__ or "")
    curve = learn(arguments.steps, arguments.seed)
    every = max(1, arguments.steps // 20)
    shown = [i for i in range(arguments.steps) if i == 0 or (i + 1) % every == 0]
    rows = [[str(i + 1), f"{curve.rewards[i]:.3f}", f"{curve.entropies[i]:.3f}"] for i in shown]
    above = next((i + 1 for i, value in enumerate(curve.rewards) if value > 0.8), None)
    report.table(
        ["step", "mean reward", "entropy, nats per token"],
        rows,
        note=f"{arguments.steps} steps in {curve.seconds:.0f} s, {curve.cpu_seconds:.0f} s of CPU time, "
        f"{torch.get_num_threads()} threads; "
        + (f"first above 0.8 at step {above}." if above else "never above 0.8."),
    )
    report.write()
    if arguments.picture:
        draw(curve, arguments.picture)
    return 0


if __name__ == "__main__":
    main()
