"""FSDP2 with `CPUOffloadPolicy`: fp32 sharded parameters in pinned host memory, bf16 compute, fused AdamW on
the CPU. Each decoder layer is a unit of its own. On one rank, or on several (`many_ranks.py`), which may be
CPUs; gradients are then reduced in each micro-batch, as CPU offload asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import adam_options, backward, decay_groups, prepare
from horizon_lm.bench.protocol import Case

from . import check_takes, device_of_rank, open_group, share_of


class Fsdp2:
    def __init__(self, case: Case) -> None:
        self.case, self.device = case, device_of_rank(case)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        open_group("cpu:gloo,cuda:nccl")  # gloo: the norm of gradients that lie on the CPU
        on_cuda = self.device.type == "cuda"
        model = prepare(own(source_model(case), torch.float32), case)
        policy = MixedPrecisionPolicy(param_dtype=case.torch_dtype, reduce_dtype=torch.float32)
        options = {"mp_policy": policy, "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda)}
        options["mesh"] = init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        for layer in model.get_decoder().layers:
            fully_shard(layer, **options)
        self.model = fully_shard(model, **options)
        for module in model.modules():  # the policy moves parameters; buffers (rotary tables) stay behind
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        groups = decay_groups(model, case.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, **adam_options(case))

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss = backward(self.model, share_of(micro_batches), self.device)
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def build(case: Case) -> Fsdp2:
    return Fsdp2(case)


def check() -> str:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    check_takes(fully_shard, "mp_policy", "offload_policy")
    MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    CPUOffloadPolicy(pin_memory=True)
    return "fully_shard and its policies"
