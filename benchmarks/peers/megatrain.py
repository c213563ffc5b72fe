"""MegaTrain (MEGATRAIN names a checkout): bf16 weights on the CPU, streamed layers, DeepSpeed's CPUAdam.

There are no fp32 masters. It clips with torch over the host's parameters, if the case clips. The batch is
one micro-batch, as in its own script; attention masks are all ones.
"""

from __future__ import annotations

from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.protocol import Case

from . import check_takes, from_checkout, installed, need_cuda


class MegaTrain:
    def __init__(self, case: Case) -> None:
        self.case, self.device = case, need_cuda(case)
        infinity = from_checkout("MEGATRAIN", "infinity")
        config = installed("infinity.config").CPUMasterConfig
        cpu_adam = installed("deepspeed.ops.adam").DeepSpeedCPUAdam
        rows = case.rows or case.sequences
        settings = config(
            model_name="random",
            dataset_name="random",
            max_seq_len=case.length,
            batch_size=rows,
            gradient_accumulation_steps=-(-case.sequences // rows),
            learning_rate=case.lr,
            weight_decay=case.weight_decay,
            beta1=case.betas[0],
            beta2=case.betas[1],
            eps=case.eps,
            max_grad_norm=case.clip or 0.0,
            attn_implementation=case.attention,
            checkpoint_interval=4,
            num_grad_slabs=12,
            device=0,
            dtype=case.torch_dtype,
            enable_timing=False,
        )
        self.model = infinity.CPUMasterModel(own(source_model(case), case.torch_dtype), settings)
        self.optimizer = cpu_adam(
            self.model.get_parameters(),
            lr=case.lr,
            betas=case.betas,
            eps=case.eps,
            weight_decay=case.weight_decay,
            adamw_mode=True,
        )

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss = 0.0
        for ids in micro_batches:
            part, *_ = self.model.forward_and_backward(ids, torch.ones_like(ids), ids)
            loss += float(part) / len(micro_batches)
        if self.case.clip:
            torch.nn.utils.clip_grad_norm_(self.model.get_parameters(), self.case.clip)
        self.optimizer.step()
        self.model._sync_params_to_gpu()  # its own script calls it
        self.model.zero_grad()
        self.optimizer.zero_grad()
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 1.0}

    def close(self) -> None:
        self.model.cleanup()


def build(case: Case) -> MegaTrain:
    return MegaTrain(case)


def check() -> str:
    model = from_checkout("MEGATRAIN", "infinity").CPUMasterModel
    config = installed("infinity.config").CPUMasterConfig
    check_takes(config, "max_seq_len", "gradient_accumulation_steps", "checkpoint_interval", "num_grad_slabs")
    check_takes(model.forward_and_backward)
    return "CPUMasterModel and its configuration"
