"""TrainStream: `wrap(model, optimizer)` over fp32 weights with bf16 autocast.

`offload=True` keeps it from switching to a stock optimizer if the model fits; activations are recomputed as
for all, not paged. With clipping its updates are no longer eager. `case.extra["param_offload"]` pages the
weights too. Its extension is compiled at the first import and needs nvcc.
"""

from __future__ import annotations

from typing import Any

import torch

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import adam_options, backward, decay_groups, prepare
from horizon_lm.bench.protocol import Case

from . import check_source_takes, installed, need_cuda


def options_of(case: Case) -> dict[str, Any]:
    """Return the keywords of `wrap`."""
    rows = case.rows or case.sequences
    return {
        "offload": True,
        "activation_offload": False,
        "param_offload": case.extra.get("param_offload", False),
        "moment_dtype": "float32",
        "max_grad_norm": case.clip,
        "accumulation_steps": -(-case.sequences // rows),
        "quantize": "none",
    }


class TrainStream:
    def __init__(self, case: Case) -> None:
        self.case, self.device = case, need_cuda(case)
        trainstream = installed("trainstream")
        paged = case.extra.get("param_offload", False)
        place = "cpu" if paged else self.device
        model = prepare(own(source_model(case), torch.float32, place), case)
        groups = decay_groups(model, case.weight_decay)
        optimizer = torch.optim.AdamW(groups, **(adam_options(case) | {"fused": not paged}))
        self.model, self.optimizer = trainstream.wrap(
            model, optimizer, device=self.device, **options_of(case)
        )

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        low = self.case.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            loss = backward(self.model, micro_batches, self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0 if self.case.activations == "keep" else 1.0}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""


def build(case: Case) -> TrainStream:
    return TrainStream(case)


def check() -> str:
    """Its import compiles CUDA code, so its source is read."""
    options = options_of(Case({}))
    check_source_takes("trainstream", "wrapper.py", "wrap", "model", "optimizer", "device", *options)
    return "wrap, in its source"
