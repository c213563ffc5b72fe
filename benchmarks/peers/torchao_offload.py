"""torchao's `CPUOffloadOptimizer`: bf16 weights on the device, gradients and fused AdamW on the CPU.

Pure bf16: no fp32 masters, and bf16 moments. It cannot clip by the global norm, since gradients leave
during the backward pass; a case with clipping is absent for that reason. One micro-batch per step, as
`offload_gradients` requires.
"""

from __future__ import annotations

from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import adam_options, backward, decay_groups, prepare
from horizon_lm.bench.protocol import AbsentError, Case

from . import check_takes, installed, need_cuda


class TorchaoOffload:
    def __init__(self, case: Case) -> None:
        self.case, self.device = case, need_cuda(case)
        if case.clip:
            raise AbsentError("cannot clip by the global norm while gradients are offloaded")
        rows = case.rows or case.sequences
        if rows < case.sequences:
            raise AbsentError("offload_gradients takes one micro-batch a step")
        optimizer = installed("torchao.optim").CPUOffloadOptimizer
        self.model = prepare(own(source_model(case), torch.bfloat16, self.device), case)
        groups = decay_groups(self.model, case.weight_decay)
        self.optimizer = optimizer(groups, torch.optim.AdamW, offload_gradients=True, **adam_options(case))

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss = backward(self.model, micro_batches, self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def build(case: Case) -> TorchaoOffload:
    return TorchaoOffload(case)


def check() -> str:
    optimizer = installed("torchao.optim").CPUOffloadOptimizer
    check_takes(optimizer, "params", "optimizer_class", "offload_gradients")
    return "CPUOffloadOptimizer"
