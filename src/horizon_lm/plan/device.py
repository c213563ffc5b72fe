"""Device bytes of the slots, which live as long as the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from horizon_lm.memory.layout import UnitLayout
from horizon_lm.schedule import StepSpec


def slot_bytes(units: Sequence[UnitLayout], plan: StepSpec, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weight and gradient slots. Gradients are accumulated in fp32."""
    weights = max((units[u].slot_numel for u in plan.uploaded), default=0)
    downloaded = [u for u in plan.trainable if u <= plan.head]
    gradients = max((units[u].trainable_numel for u in downloaded), default=0)
    return {
        "weight_slots": plan.slots * weights * dtype.itemsize,
        "gradient_slots": plan.grad_slots * gradients * torch.float32.itemsize,
    }
