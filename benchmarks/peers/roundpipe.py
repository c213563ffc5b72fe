"""RoundPipe (`roundpipe`): pipeline stages that visit the device, over masters on the host.

bf16 weights with fp32 masters and moments, updated on the CPU by its own Adam, which is compiled at first
use. Its documented step is asynchronous and trains on weights that are one step old; this adapter calls the
synchronous step unless `case.extra["stale"]` is set. The norm is clipped in the update function.

Written from the sources of 0.1.1; not run so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from horizon_lm.bench.models import own, source_model
from horizon_lm.bench.plain import groups_of
from horizon_lm.bench.protocol import Case

from . import check_source_takes, installed, need_cuda, need_equal_micro_batches


class RoundPipe:
    def __init__(self, case: Case) -> None:
        need_cuda(case)
        rows = need_equal_micro_batches(case)
        roundpipe = installed("roundpipe")
        self.case, self.count = case, case.sequences // rows
        source = own(source_model(case), case.torch_dtype)
        source.config.use_cache = False
        self.model = roundpipe.wrap_model_to_roundpipe(
            source.train(),
            optim_dtype=torch.float32,
            model_run_config=roundpipe.RoundPipeRunConfig(num_microbatch=self.count),
            pin_model="register",
        )
        groups = groups_of(list(self.model.optim_named_parameters()), case.weight_decay)
        self.optimizer = roundpipe.optim.Adam(
            groups, lr=case.lr, betas=case.betas, eps=case.eps, decoupled_weight_decay=True
        )

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        ids = torch.cat(micro_batches)
        loss = self.model.forward_backward(
            input_kwargs={"input_ids": ids, "labels": ids},
            loss_fn=lambda outputs, _: outputs.loss / self.count,
        )
        self.model.step(self._update, is_async=bool(self.case.extra.get("stale", False)))
        return float(loss)

    def _update(self) -> None:
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.model.optim_parameters(), self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 1.0}

    def close(self) -> None:
        """Wait for the last update."""
        self.model.synchronize()


def build(case: Case) -> RoundPipe:
    return RoundPipe(case)


def check() -> str:
    """Its import asks for the device's memory, so its source is read."""
    check_source_takes("roundpipe", "roundpipe.py", "RoundPipe.__init__", "optim_dtype", "pin_model")
    check_source_takes(
        "roundpipe", "roundpipe.py", "RoundPipe.forward_backward", "input_kwargs", "label", "loss_fn"
    )
    check_source_takes("roundpipe", "roundpipe.py", "RoundPipeBase.step", "step_fn", "is_async")
    check_source_takes("roundpipe", "roundpipe.py", "RoundPipeBase.optim_named_parameters")
    check_source_takes("roundpipe", "run_config.py", "RoundPipeRunConfig.__init__", "num_microbatch")
    check_source_takes(
        "roundpipe", "optim/adam.py", "Adam.__init__", "betas", "eps", "decoupled_weight_decay"
    )
    return "parameters, in its source"
