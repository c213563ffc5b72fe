"""Horizon-LM as a system of the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from horizon_lm.bench.lanes import breakdown
from horizon_lm.bench.models import source_model
from horizon_lm.bench.protocol import Case
from horizon_lm.config import ModelSettings, TrainConfig, model_settings_of
from horizon_lm.errors import UnsupportedModelError
from horizon_lm.host_model import HostModel
from horizon_lm.plan.run_plan import plan_run


class Ours:
    """extra: any setting of `ModelSettings`. With activations=auto or rows=0 the planner chooses as it does
    for `horizon train`, by this machine's profile where `horizon doctor` has made one."""

    def __init__(self, case: Case) -> None:
        self.case = case
        settings, self.rows, self.chosen = settle(case)
        self.model = HostModel(source_model(case), settings)

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        return self._step(micro_batches, record=False)

    def _step(self, micro_batches: list[torch.Tensor], record: bool) -> float:
        batches = [{"input_ids": ids, "labels": ids} for ids in micro_batches]
        decay = self.case.weight_decay
        return self.model.train_step(batches, lr=self.case.lr, weight_decay=decay, record=record).loss

    def breakdown(self, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
        """One more step, recorded: what each lane did (`lanes.breakdown`)."""
        self._step(micro_batches, record=True)
        return breakdown(self.model)

    def describe(self) -> dict[str, Any]:
        """What the planner chose, the share of layers that are recomputed, bytes by part."""
        kept = len(self.model.engine.policies.kept)
        layers = self.model.skeleton.num_layers
        memory = self.model.memory_bytes()
        pinned = sum(memory.get(n, 0) for n in ("weights", "grads", "grad_slabs", "boundaries"))
        return {
            "rows": self.rows,
            "recomputed": 1 - kept / layers,
            "update": self.model.settings.update_mode,
            "memory": memory,
            "pinned": pinned if self.model.device.type == "cuda" else 0,
            **self.chosen,
        }

    def close(self) -> None:
        self.model.flush()


def train_config(case: Case) -> TrainConfig:
    """The run that a case stands for, as `horizon plan` takes it."""
    cut: dict[str, Any] = {"tokens_per_step": case.tokens}
    if case.rows:
        rows = min(case.rows, case.sequences)
        count = -(-case.sequences // rows)
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": count}
    data: Any = ["none"]  # none is read
    common = {"init_model": case.model, "datasets": data, "max_length": case.length}
    return TrainConfig(**common, **cut, **_settings(case))


def _settings(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": case.device,
        "dtype": case.dtype,
        "attn_implementation": case.attention,
    }
    found |= {"max_grad_norm": case.clip, "adam_beta1": case.betas[0], "adam_beta2": case.betas[1]}
    found |= {"adam_epsilon": case.eps, "activations": case.activations, "seed": case.seed}
    if case.threads:
        found["optimizer_threads"] = case.threads
    return found | case.extra


def settle(case: Case) -> tuple[ModelSettings, int, dict[str, Any]]:
    """(settings, rows of a micro-batch, what was chosen and by which profile)."""
    config = train_config(case)
    rows = case.rows or case.sequences
    chosen: dict[str, Any] = {}
    if case.activations == "auto" or not case.rows:
        try:
            plan = plan_run(config)
        except UnsupportedModelError as error:
            chosen = {"plan": f"none: {error.message}"}
        else:
            config, rows = plan.config, plan.config.per_device_train_batch_size
            chosen = {"plan": plan.profile.name, "predicted_seconds": plan.prediction.seconds}
    return model_settings_of(config), rows, chosen


def build(case: Case) -> Ours:
    return Ours(case)
