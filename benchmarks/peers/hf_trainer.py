"""The Hugging Face `Trainer`: fp32 weights, bf16 autocast, fused AdamW.

The Trainer owns the loop, so this drives its `training_step` and optimizer as its own loop does:
accumulate, clip through accelerate, step, zero. Betas, decay and clipping are the case's.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import prepare
from horizon_lm.bench.protocol import Case

from . import check_takes, installed


def arguments_of(case: Case) -> dict[str, Any]:
    """Return the keywords of `TrainingArguments`, without output_dir."""
    return {
        "bf16": case.dtype == "bfloat16",
        "use_cpu": case.device == "cpu",
        "optim": "adamw_torch_fused",
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": case.betas[0],
        "adam_beta2": case.betas[1],
        "adam_epsilon": case.eps,
        "weight_decay": case.weight_decay,
        "max_grad_norm": case.clip or 0.0,
        "per_device_train_batch_size": case.rows or case.sequences,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class HfTrainer:
    def __init__(self, case: Case) -> None:
        installed("accelerate")
        from transformers import Trainer, TrainingArguments

        self.case = case
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(output_dir=self._folder.name, **arguments_of(case))
        model = prepare(own(source_model(case), torch.float32), case)
        self.trainer = Trainer(model=model, args=arguments)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        accelerator = self.trainer.accelerator
        self.model, self.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        trainer, loss = self.trainer, 0.0
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        total = torch.tensor(sum(ids.numel() - len(ids) for ids in micro_batches))
        for ids in micro_batches:
            inputs = {"input_ids": ids, "labels": ids}
            part = trainer.training_step(self.model, inputs, num_items_in_batch=total.to(trainer.args.device))
            loss += float(part)
        if self.case.clip:
            trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()
        self.model.zero_grad()
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        self._folder.cleanup()


def build(case: Case) -> HfTrainer:
    return HfTrainer(case)


def check() -> str:
    installed("accelerate")
    from transformers import Trainer, TrainingArguments

    check_takes(TrainingArguments, "output_dir", *arguments_of(Case({})))
    check_takes(Trainer.training_step, "num_items_in_batch")
    check_takes(Trainer.create_optimizer_and_scheduler, "num_training_steps")
    return "TrainingArguments, Trainer.training_step"
