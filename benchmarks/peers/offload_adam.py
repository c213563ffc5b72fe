"""offload_adam (OFFLOAD_ADAM names a checkout): bf16 weights on the device, states streamed to the device.

Uses mode `fp32_master` (fp32 masters, bf16 moments) unless `case.extra["mode"]` sets another. Without
clipping it updates in the backward pass; with clipping it makes a separate step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import prepare
from horizon_lm.bench.protocol import Case

from . import check_takes, from_checkout, need_cuda


class OffloadAdam:
    def __init__(self, case: Case) -> None:
        self.case, self.device = case, need_cuda(case)
        optimizer = from_checkout("OFFLOAD_ADAM", "offload_adam", "src").OffloadAdam
        self.model = prepare(own(source_model(case), torch.bfloat16, self.device), case)
        options: dict[str, Any] = {"lr": case.lr, "betas": case.betas, "eps": case.eps}
        options |= {"weight_decay": case.weight_decay, "decoupled_weight_decay": True}
        options["mode"] = case.extra.get("mode", "fp32_master")
        if case.clip:  # the name has changed between its versions
            known = inspect.signature(optimizer).parameters
            old = {"gradient_clipping": {"max_norm": case.clip, "norm_type": 2.0}}
            options |= {"max_grad_norm": case.clip} if "max_grad_norm" in known else old
        self.optimizer = optimizer(self.model, **options)

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss, last = 0.0, len(micro_batches) - 1
        for i, ids in enumerate(micro_batches):
            self.optimizer.ready_for_optimizer_step = i == last
            ids = ids.to(self.device)
            part = self.model(input_ids=ids, labels=ids).loss / len(micro_batches)
            part.backward()
            loss += float(part.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def build(case: Case) -> OffloadAdam:
    return OffloadAdam(case)


def check() -> str:
    optimizer = from_checkout("OFFLOAD_ADAM", "offload_adam", "src").OffloadAdam
    check_takes(optimizer, "lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "mode")
    return "OffloadAdam"
