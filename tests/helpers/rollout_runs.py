"""GRPO and RLOO by TRL's trainers and by ours, on tiny models, and what differs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks import grpo_toy
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from horizon_lm.trainers import HorizonGRPOTrainer, HorizonRLOOTrainer
from trainer_pairs import ONE_ENTRY

Run = SimpleNamespace
OURS = {GRPOTrainer: HorizonGRPOTrainer, RLOOTrainer: HorizonRLOOTrainer}
CONFIGS = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "vocab_size": 19}
TINY |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
PROMPTS = Dataset.from_dict({"prompt": ["a:", "bc:", "defg:", "hh:", "ijk:", "l:", "mn:", "op:"] * 4})


def variety(completions: list[str], **_: Any) -> list[float]:
    return [len(set(completion)) / 4 for completion in completions]


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeio" for letter in completion)) for completion in completions]


def built(kind: type, folder: Path, out: Path, rewards: Any = variety, **changes: Any) -> Any:
    """Make TRL's trainer or ours. trainer: arguments of the trainer, else of its configuration."""
    base = next(theirs for theirs in CONFIGS if issubclass(kind, theirs))
    values: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 4}
    values |= {"max_completion_length": 4, "learning_rate": 5e-4, "lr_scheduler_type": "constant"}
    values |= {"beta": 0.0, "epsilon": 0.02, "bf16": False, "use_cpu": True, "seed": 3, "logging_steps": 1}
    values |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    given = {"train_dataset": PROMPTS, "processing_class": grpo_toy.tokenizer(), "reward_funcs": rewards}
    given |= changes.pop("trainer", {})
    given = {"model": str(folder), **given}
    trainer = kind(args=CONFIGS[base](str(out), **(values | changes)), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(kind: type, folder: Path, out: Path, rewards: Any = variety, **changes: Any) -> Run:
    """Train by TRL's trainer or ours."""
    resume = changes.pop("resume", None)
    trainer = built(kind, folder, out, rewards, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return result(trainer)


def result(trainer: Any) -> Run:
    """Return a trainer, its parameters and its log."""
    if isinstance(trainer, tuple(OURS.values())):
        parameters = dict(trainer.host.named_parameters())
    else:
        named = trainer.model.named_parameters()
        parameters = {name.removeprefix("base_model.model."): p.detach() for name, p in named}
    return Run(trainer=trainer, parameters=parameters, log=trainer.state.log_history)


def differences(theirs: Run, ours: Run) -> list[str]:
    """What differs: parameters by more than 3e-6, logged numbers by more than 1e-5 of their value.

    Roundoff decides Adam's step of an entry whose gradient is near zero: one entry of a parameter may differ
    by up to ONE_ENTRY, where entries move by 1e-3.
    """
    found = []
    for name, value in theirs.parameters.items():
        off = (value - ours.parameters[name]).abs()
        worst = float(off.max())
        if not worst <= ONE_ENTRY or int((off > 3e-6).sum()) > 1:
            found.append(f"{name}: {worst:.1e}")
    if len(theirs.log) != len(ours.log):
        found.append("lines")
    for line, (one, two) in enumerate(zip(theirs.log, ours.log, strict=False)):
        if one.keys() != two.keys():
            found.append(f"line {line}: {one.keys() ^ two.keys()}")
        for key in one.keys() & two.keys():
            # Small differences of large numbers: of advantages times ratios, of log-probabilities near 3.
            least = 3e-7 if key.endswith(("loss", "kl")) else 0.0
            timed = "time" in key or "per_second" in key
            if not timed and not _close(one[key], two[key], least):
                found.append(f"line {line}, {key}: {one[key]} and {two[key]}")
    return found


def _close(one: Any, two: Any, least: float) -> bool:
    if not isinstance(one, float) or not isinstance(two, float):
        return one == two
    return math.isclose(one, two, rel_tol=1e-5, abs_tol=least) or (math.isnan(one) and math.isnan(two))


def moved(run: Run, folder: Path) -> float:
    before = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    return max(float((value - before[name]).detach().abs().max()) for name, value in run.parameters.items())
