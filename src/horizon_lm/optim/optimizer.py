"""The update of a unit in the host store, by the C++ kernel or the torch reference (same bits)."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.store import HostStore
from .kernel import update_run
from .rules import Hyper


@dataclass(frozen=True)
class Optimizer:
    """AdamW with the settings that hold for a whole run; the others come with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seed: int = 0

    def update_unit(
        self, store: HostStore, unit: int, *, step: int, lr: float, weight_decay: float, grad_scale: float
    ) -> None:
        """Update the unit's trainable part in place from `grads * grad_scale`.

        step: 1 for the first update (bias correction). grad_scale: the clipping factor.
        """
        layout = store.units[unit]
        residual = None
        if store.has("residual"):  # which also covers frozen parameters before the trainable ones
            residual = store.run("residual", unit)[layout.trainable_offset - layout.wide_offset :]
        update_run(
            "adamw",
            store.run("weights", unit)[layout.trainable_offset :],
            residual,
            store.run("grads", unit),
            store.run("exp_avg", unit),
            store.run("exp_avg_sq", unit),
            hyper=Hyper(lr, self.beta1, self.beta2, self.epsilon, weight_decay),
            step=step,
            grad_scale=grad_scale,
            element_offset=sum(u.trainable_numel for u in store.units[:unit]),
            seed=self.seed,
        )
