"""Small runs of Trainers over the streamed engine, and what they left, to compare bit by bit."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, GRPOConfig, SFTConfig

from horizon_lm.checkpoint import units
from horizon_lm.host_model import HostModel
from horizon_lm.trainers import HorizonDPOTrainer, HorizonGRPOTrainer, HorizonSFTTrainer

WORDS = [f"w{n}" for n in range(60)]
CLOCK = ("total_flos", "train_loss")  # these, times and rates


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model_folder(place: Path) -> Path:
    """Write a GPT-2 with dropout in fp32."""
    config = GPT2Config(
        vocab_size=len(WORDS) + 3,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def _text(rng: random.Random, least: int = 3, most: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def texts(rows: int = 26) -> Dataset:
    rng = random.Random(1)
    return Dataset.from_dict({"text": [_text(rng) for _ in range(rows)]})


def pairs(rows: int = 26) -> Dataset:
    rng = random.Random(2)
    columns = {name: [_text(rng) for _ in range(rows)] for name in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict({name: [" " + one for one in column] for name, column in columns.items()})


def prompts(rows: int = 12) -> Dataset:
    rng = random.Random(3)
    return Dataset.from_dict({"prompt": [_text(rng) for _ in range(rows)]})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [one.count("w1") + len(one) / 100 for one in completions]


# Of GRPO, four steps use the completions of one generation.
GENERATION = {
    "num_generations": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_completion_length": 5,
}
KINDS: dict[str, Any] = {
    "sft": (HorizonSFTTrainer, SFTConfig, texts, {"max_length": 32}, {}),
    "dpo": (HorizonDPOTrainer, DPOConfig, pairs, {"max_length": 32}, {}),
    "grpo": (HorizonGRPOTrainer, GRPOConfig, prompts, GENERATION, {"reward_funcs": reward}),
}


def make(kind: str, model: Any, run: Path, *, more: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Make a trainer: 10 steps, accumulation 2, so that an epoch ends within a step. more: its arguments."""
    trainer, config, data, own, required = KINDS[kind]
    values: dict[str, Any] = {
        "output_dir": str(run),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 5,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        **own,
        **changes,
    }
    arguments = {"train_dataset": data(), "processing_class": tokenizer(), **required, **(more or {})}
    return trainer(model=str(model) if isinstance(model, Path) else model, args=config(**values), **arguments)


def digests(host: HostModel) -> dict[str, str]:
    """SHA-256 of every weight, residual and moment."""
    host.flush()
    found = {}
    for unit in range(len(host.store.units)):
        for name, tensor in units.entries(host.store, unit):
            found[name] = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
    assert any(name.startswith("exp_avg_sq.") for name in found)
    return found


def history(trainer: Any) -> list[dict[str, Any]]:
    """The log without what the clock decides, and without the summary of one call of train()."""
    return [
        {k: v for k, v in line.items() if k not in CLOCK and "time" not in k and "per_second" not in k}
        for line in trainer.state.log_history
    ]
