"""DeepSpeed: ZeRO-3 with parameters and optimizer on the CPU, SuperOffload, and ZenFlow.

Settings are explicit if defaults would decide the comparison: `gradient_clipping` always (0.19.4 and later
clip at 1.0 by default, and SuperOffload then loses its overlap), pinned memory, bf16 with fp32 masters,
`DeepSpeedCPUAdam`. The process may use all cores. Masters start from the bf16 weights, as DeepSpeed casts
the model first. ZenFlow postpones most updates: it is not exact.

Run here on DeepSpeed's CPU accelerator (its own code, but no real offload): ZeRO-3 with 0.18.8 and 0.19.8,
ZenFlow with 0.19.8 (0.18.8 gives NaN there). SuperOffload needs CUDA and has not run.
"""

from __future__ import annotations

from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import decay_groups, prepare
from horizon_lm.bench.protocol import Case

from . import check_takes, device_of_rank, installed, open_group, share_of, world

_CPU = {"device": "cpu", "pin_memory": True}
_COMMON = {"overlap_comm": True, "contiguous_gradients": True}
_STAGE3 = _COMMON | {"stage": 3, "sub_group_size": 10**9, "stage3_prefetch_bucket_size": 5 * 10**8}
ZERO3 = _STAGE3 | {"offload_param": dict(_CPU), "offload_optimizer": dict(_CPU)}
_SUPER = {"ratio": 0.9, "super_offload": True, "cpuadam_cores_perc": 0.9}
SUPEROFFLOAD = _STAGE3 | {"offload_optimizer": _CPU | _SUPER}
ZENFLOW = _COMMON | {"stage": 2, "offload_optimizer": dict(_CPU)}
ZENFLOW |= {
    "zenflow": {
        "topk_ratio": 0.05,
        "select_strategy": "auto",
        "select_interval": "auto",
        "update_interval": 4,
        "full_warm_up_rounds": 0,
        "overlap_step": True,
    }
}


def settings_of(case: Case, zero: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a case."""
    rows = case.rows or case.sequences
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": -(-case.sequences // rows) // world(),
        "gradient_clipping": case.clip or 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeed:
    """DeepSpeed's engine. zero: the `zero_optimization` part of the configuration."""

    def __init__(self, case: Case, zero: dict[str, Any]) -> None:
        self.case, self.device = case, device_of_rank(case)
        deepspeed, ops = installed("deepspeed"), installed("deepspeed.ops.adam")
        open_group("nccl")
        model = prepare(own(source_model(case), torch.bfloat16), case)
        groups = decay_groups(model, case.weight_decay)
        settings = settings_of(case, zero)
        adam = {"lr": case.lr, "betas": case.betas, "eps": case.eps}
        if zero is ZENFLOW:  # reads these settings, and builds its optimizer, which is not on its own list
            settings["optimizer"] = {"type": "AdamW", "params": adam | {"weight_decay": case.weight_decay}}
            settings["zero_allow_untested_optimizer"] = True
            given = {"model_parameters": groups}
        else:
            if zero is SUPEROFFLOAD:  # in 0.18 a group that is one bucket ends in a KeyError, as norms are
                every = list(model.parameters())
                groups = [{"params": every, "weight_decay": case.weight_decay}]
                bucket = min(zero["sub_group_size"], sum(p.numel() for p in every) // 2)
                settings["zero_optimization"] = zero | {"sub_group_size": bucket}
            given = {"optimizer": ops.DeepSpeedCPUAdam(groups, **adam, adamw_mode=True)}
        self.engine, *_ = deepspeed.initialize(model=model, config=settings, **given)

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        loss, micro_batches = 0.0, share_of(micro_batches)
        for ids in micro_batches:  # of equal size: the engine divides by their number
            ids = ids.to(self.device)
            part = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(part)
            self.engine.step()  # acts at the last of them
            loss += float(part.detach()) / len(micro_batches)
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        self.engine.destroy()


def build_zero3(case: Case) -> DeepSpeed:
    return DeepSpeed(case, ZERO3)


def build_superoffload(case: Case) -> DeepSpeed:
    return DeepSpeed(case, SUPEROFFLOAD)


def build_zenflow(case: Case) -> DeepSpeed:
    return DeepSpeed(case, ZENFLOW)


def _check_known(given: dict[str, Any], model: Any) -> None:
    """Raise TypeError for a key, at any depth, that DeepSpeed's model would keep without a meaning."""
    fields = {field.alias or name: name for name, field in type(model).model_fields.items()}
    fields |= {name: name for name in type(model).model_fields}
    for key, value in given.items():
        if key not in fields:
            raise TypeError(f"{type(model).__name__} takes no {key}")
        if isinstance(value, dict):
            _check_known(value, getattr(model, fields[key]))


def check() -> str:
    """Parse all three configurations with DeepSpeed's own reader."""
    deepspeed, ops = installed("deepspeed"), installed("deepspeed.ops.adam")
    reader = installed("deepspeed.runtime.config").DeepSpeedConfig
    case = Case({}, sequences=4, rows=2)
    for zero in (ZERO3, SUPEROFFLOAD, ZENFLOW):
        parsed = reader(settings_of(case, zero))
        _check_known(zero, parsed.zero_config)
        if parsed.gradient_clipping != case.clip or parsed.gradient_accumulation_steps != 2:
            raise TypeError("clipping or accumulation is not read as it is set")
    check_takes(ops.DeepSpeedCPUAdam, "model_params", "lr", "betas", "eps", "adamw_mode")
    check_takes(deepspeed.initialize, "model", "config", "optimizer", "model_parameters")
    return "configurations of ZeRO-3, SuperOffload and ZenFlow"
