"""`HorizonDPOTrainer` and `HorizonKTOTrainer`: the reference is evaluated before training, and never a second
model in memory."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from horizon_lm.config.data import IGNORED
from horizon_lm.host_model import HostModel
from horizon_lm.outputs import ForwardBackwardOutput
from horizon_lm.trainers.base import HorizonMixin, Inputs
from horizon_lm.trainers.view import Answer, evaluate, view_of


class HorizonPreferences(HorizonMixin):
    """What the trainers with a reference share: the model as it is before training, or `ref_model`."""

    def __init__(self, model: Any = None, *positional: Any, **named: Any) -> None:
        super().__init__(model, *positional, **named)
        self.ref_model = None

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        given["args"].precompute_ref_log_probs = True
        return {**given, "ref_model": view_of(self.host, (), _identity(self.host, given["args"]))}

    def micro_batch(self, inputs: Inputs, prefix: str = "") -> Inputs:
        """prefix: that of the names in the batch."""
        ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"]
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(mask == 0, IGNORED),
            "attention_mask": inputs[f"{prefix}attention_mask"],
        }


class HorizonDPOTrainer(HorizonPreferences, DPOTrainer):
    """`trl.DPOTrainer` on the streamed engine. See `HorizonMixin`."""

    config_class = DPOConfig
    token_values = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class HorizonKTOTrainer(HorizonPreferences, KTOTrainer):
    """`trl.KTOTrainer` on the streamed engine. The completions of its KL term are evaluated before a step."""

    config_class = KTOConfig
    token_values = ("entropy", "mean_logits")

    def forward_backward(self) -> ForwardBackwardOutput:
        if self.calculate_KL:
            others = [self.micro_batch(inputs, "KL_") for inputs, _, _ in self._micro_batches]
            self._kl_answers = evaluate(self.model, others, ())
        return super().forward_backward()

    def other_answers(self, batch: dict[str, torch.Tensor]) -> list[Answer]:
        return [self._kl_answers[int(batch["micro_batch"])]] if self.calculate_KL else []


def _identity(host: HostModel, args: Any) -> bytes:
    """Hash what log-probabilities of a dataset depend on: weights, dtypes, attention and lengths."""
    names = ("max_length", "truncation_mode", "ld_alpha")
    found = hashlib.sha256(repr([getattr(args, name, None) for name in names]).encode())
    found.update(f"{host.settings.dtype} {host.settings.attn_implementation} {host.device.type}".encode())
    for name, value in host.named_parameters():
        found.update(name.encode())
        found.update(value.contiguous().numpy().data)
    return found.digest()
