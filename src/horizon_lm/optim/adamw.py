"""AdamW on the split master, one unit at a time: the torch reference.

Decoupled weight decay (Loshchilov and Hutter 2019), in the order of operations of
`torch.optim.AdamW` for single tensors, so that the fp32 masters follow it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.master import join_master, split_master
from ..memory.store import HostStore

_CHUNK = 1 << 18  # elements; the temporaries of a chunk (about 6 MB) are all the memory an update adds


@dataclass(frozen=True)
class AdamW:
    """betas and epsilon of the moments; the other settings come with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def update_unit(
        self, store: HostStore, unit: int, *, step: int, lr: float, weight_decay: float, grad_scale: float
    ) -> None:
        """Update the unit's trainable part in place from `grads * grad_scale`.

        step: 1 for the first update (bias correction). grad_scale: the clipping factor.
        """
        layout = store.units[unit]
        weights = store.run("weights", unit)[layout.trainable_offset :]
        runs = [weights, *(store.run(name, unit) for name in ("grads", "exp_avg", "exp_avg_sq"))]
        if store.has("residual"):  # which also covers frozen parameters before the trainable ones
            runs.append(store.run("residual", unit)[-layout.trainable_numel :])
        for weight, grad, exp_avg, exp_avg_sq, *residual in zip(
            *(run.split(_CHUNK) for run in runs), strict=True
        ):
            master = join_master(weight, residual[0]) if residual else weight
            gradient = grad.to(torch.float32)
            if grad_scale != 1.0:
                gradient = gradient * grad_scale
            self._update(master, gradient, exp_avg, exp_avg_sq, step=step, lr=lr, weight_decay=weight_decay)
            if residual:
                split_master(master, weight, residual[0])

    def _update(
        self,
        master: torch.Tensor,
        gradient: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        master.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(gradient, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        correction1 = 1 - self.beta1**step
        correction2 = 1 - self.beta2**step
        denominator = (exp_avg_sq.sqrt() / correction2**0.5).add_(self.epsilon)
        master.addcdiv_(exp_avg, denominator, value=-lr / correction1)
