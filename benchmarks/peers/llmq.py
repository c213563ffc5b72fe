"""LLM.Q (`pyllmq`, a wheel of its releases or built from its repository): training in CUDA and C++.

Its Python API takes shapes of Qwen2 and one micro-batch per call; loss and norm are returned by the update.
Masters and both moments are on the host: in fp32 (exact), or all in bf16, as in its own benchmarks, with
`case.extra["states"] = "bf16"`; bf16 masters are rounded stochastically. Gradients accumulate in bf16. It
uses its own random weights.
`case.extra["recompute"]` recomputes less than whole blocks: `ffn`, `swiglu`, `att`.

Written from its public sources (0.3.2); not run so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from horizon_lm.bench.protocol import AbsentError, Case

from . import check_takes, installed, need_cuda, need_equal_micro_batches

IGNORED = -100
UNLIMITED = 1e30  # it always compares the norm with a limit


def shape_of(case: Case) -> dict[str, Any]:
    """Return the keywords of its `Config`. Raises AbsentError for a model that it does not have."""
    model = case.model
    if model["model_type"] != "qwen2":
        raise AbsentError(f"trains qwen2 models only, and this is {model['model_type']}")
    same = "hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads"
    same += " num_hidden_layers max_position_embeddings rms_norm_eps tie_word_embeddings"
    rope = model.get("rope_parameters", {}).get("rope_theta", 10000.0)
    found = {name: model[name] for name in same.split()}
    return {"architecture": "qwen2", "rope_theta": rope, "dtype": "bf16"} | found


def options_of(case: Case) -> dict[str, Any]:
    """Return the keywords of its `LLamaOptions`."""
    states = case.extra.get("states", "fp32")
    options: dict[str, Any] = {"offload_master": True, "offload_opt_m": True, "offload_opt_v": True}
    options |= {"master_dtype": states, "momentum_type": states, "variance_type": states}
    if case.activations != "keep":
        options |= {f"recompute_{case.extra.get('recompute', 'block')}": True, "offload_residual": True}
    return options


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each, [rows, length]; none follows a row's last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)


class LlmQ:
    def __init__(self, case: Case) -> None:
        need_cuda(case)
        shape, rows = shape_of(case), need_equal_micro_batches(case)
        pyllmq = installed("pyllmq")
        self.case, self._steps = case, 0
        self.trainer = pyllmq.LLMQTrainer(
            ngpu=1,
            config=pyllmq.Config(**shape),
            options=pyllmq.LLamaOptions(**options_of(case)),
            batch_size=rows,
            seq_len=case.length,
            grad_accum=case.sequences // rows,
        )
        self.trainer.init_weights()

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        for ids in micro_batches:
            inputs = np.ascontiguousarray(ids.numpy().astype(np.int32))
            targets = np.ascontiguousarray(targets_of(ids).numpy().astype(np.int32))
            self.trainer.step(inputs, targets)
        case = self.case
        found = self.trainer.update(
            learning_rate=case.lr,
            beta1=case.betas[0],
            beta2=case.betas[1],
            step=self._steps,
            weight_decay=case.weight_decay,
            grad_clip=case.clip or UNLIMITED,
        )
        self._steps += 1
        return float(found["loss"]) * case.length / (case.length - 1)  # it divides by all tokens

    def describe(self) -> dict[str, Any]:
        whole = self.case.extra.get("recompute", "block") == "block"
        return {"recomputed": 1.0 if self.case.activations != "keep" and whole else 0.0}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def build(case: Case) -> LlmQ:
    return LlmQ(case)


def check() -> str:
    """Check the data class of its training script, which has its options' names; the rest is compiled."""
    training = installed("pyllmq.training")
    check_takes(training.TrainingConfig, "offload_master", "offload_opt_m", "recompute_block", "grad_clip")
    return "names of its options"
