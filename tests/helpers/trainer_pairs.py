"""The same training by a trainer of TRL and by ours, on equal models and rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from horizon_lm.trainers import HorizonDPOTrainer, HorizonKTOTrainer, HorizonSFTTrainer, HorizonTrainer
from trainer_runs import WORDS, tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.05},
}
TRAINERS: dict[str, tuple[type, type, type]] = {
    "plain": (HorizonTrainer, Trainer, TrainingArguments),
    "sft": (HorizonSFTTrainer, SFTTrainer, SFTConfig),
    "dpo": (HorizonDPOTrainer, DPOTrainer, DPOConfig),
    "kto": (HorizonKTOTrainer, KTOTrainer, KTOConfig),
}


# What roundoff may do to one entry of a parameter in ten steps of 1e-3: a twentieth of one step. Measured
# where the next largest difference was 9e-8: 4.2e-6 with AVX-512, 1.7e-5 with AVX2.
ONE_ENTRY = 5e-5


def small_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **MORE[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that the loss has something to say
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _text(rng: random.Random, least: int, most: int) -> str:
    return " " + " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


@cache
def rows(method: str, number: int, seed: int) -> Dataset:
    """Rows of different lengths, so that batches are padded."""
    rng = random.Random(seed)
    names = {"dpo": ("chosen", "rejected")}.get(method, ("completion",))
    found: list[dict[str, Any]] = []
    for _ in range(number):
        row: dict[str, Any] = {"prompt": _text(rng, 2, 5), **{name: _text(rng, 1, 8) for name in names}}
        found.append({**row, "label": rng.random() < 0.5} if method == "kto" else row)
    if method == "plain":
        ids = [tokenizer()(row["prompt"] + row["completion"])["input_ids"] for row in found]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Dataset.from_list(found)


def arguments(method: str, folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    return TRAINERS[method][2](**values)


def build(
    method: str,
    kind: str,
    folder: Path,
    *,
    ours: bool,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Make a trainer, with rows to evaluate on whose last batch is short. trainer: its arguments; the changes
    are those of its configuration."""
    mine, theirs, _ = TRAINERS[method]
    more: dict[str, Any] = {}
    if method in ("dpo", "kto") and not ours:
        more["ref_model"] = small_model(kind)
    more = {"model": small_model(kind), **more}
    data = {"train_dataset": rows(method, 40, 1), "eval_dataset": rows(method, 10, 2)}
    if method == "plain":
        from transformers import DataCollatorForSeq2Seq

        more["data_collator"] = DataCollatorForSeq2Seq(tokenizer())
    return (mine if ours else theirs)(
        args=arguments(method, folder, **changes),
        processing_class=tokenizer(),
        **{**data, **more, **(trainer or {})},
    )


def parameters_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters by their names in the transformers model."""
    source = trainer.host if hasattr(trainer, "host") else trainer.model
    named = source.named_parameters()
    return {name.removeprefix("base_model.model."): value.detach().clone() for name, value in named}


@dataclass
class Trained:
    """What a training left: parameters at last, how far each entry moved, and the log."""

    parameters: dict[str, torch.Tensor]
    moved: dict[str, torch.Tensor]
    log: list[dict[str, float]] = field(default_factory=list)
    beta: float = 0.0

    @classmethod
    def by(cls, trainer: Any) -> Trained:
        before = parameters_of(trainer)
        trainer.train()
        after = parameters_of(trainer)
        moved = {name: (after[name] - before[name]).abs() for name in before}
        return cls(after, moved, trainer.state.log_history, getattr(trainer.args, "beta", 0.0))


# Of the clock, and of what differs by design: evaluation without the routers' loss, TRL's count of FLOPs.
_APART = ("runtime", "per_second", "total_flos", "preparation_time", "aux_loss")


def assert_equal(ours: Trained, theirs: Trained) -> None:
    """Parameters within 3e-6 where they moved by 1e-3; metrics within 1e-5 of their size.

    One entry of a parameter may be off by up to ONE_ENTRY: roundoff, which differs by CPU, decides Adam's
    step where the gradient is near zero.

    Rewards and the KL are beta times a difference of log-probabilities, which are larger by far: they are
    compared with the size of these. Before the first update the policy is the reference, and which of two
    equal rewards is larger is left to roundoff. Mean logits are sums of numbers of both signs near 1.
    """
    assert max(float(moved.max()) for moved in theirs.moved.values()) > 3e-3
    for name, value in theirs.parameters.items():
        off = (ours.parameters[name] - value).abs()
        first, second = _two_largest(off, theirs.moved[name])
        assert first <= ONE_ENTRY and second <= 3e-6, (name, first, second)
    assert len(ours.log) == len(theirs.log)
    for mine, wanted in zip(ours.log, theirs.log, strict=True):
        is_eval = any(name.startswith("eval_") for name in wanted)
        for name in wanted:
            if any(part in name for part in _APART) and (is_eval or "aux_loss" not in name):
                continue
            if name == "rewards/accuracies" and wanted["rewards/margins"] == 0:
                continue
            size = max(abs(wanted[name]), 1e-2 if "logits" in name else 0.0)
            if "rewards" in name or name in ("kl", "eval_kl"):
                size = theirs.beta * max(abs(v) for k, v in wanted.items() if "logps" in k)
            assert abs(mine[name] - wanted[name]) <= 1e-5 * max(size, 1e-3), (name, mine[name], wanted[name])


def _two_largest(off: torch.Tensor, moved: torch.Tensor) -> tuple[float, float]:
    first, second = torch.cat([off[moved > 1e-3].float(), torch.zeros(2)]).topk(2).values.tolist()
    return first, second
