"""Device bytes of a step, by part: from the slot table, the schedule, and the layers' working sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..memory.layout import UnitLayout
from ..schedule import Buffer, Op, StepPlan, peaks_in_order
from ..schedule.step_plan import KEEP


def slot_bytes(units: Sequence[UnitLayout], plan: StepPlan, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weight and gradient slots. Gradients are accumulated in fp32."""
    weights = max((units[u].slot_numel for u in plan.uploaded), default=0)
    downloaded = [u for u in plan.trainable if u <= plan.head]
    gradients = max((units[u].trainable_numel for u in downloaded), default=0)
    return {
        "weight_slots": plan.slots * weights * dtype.itemsize,
        "gradient_slots": plan.grad_slots * gradients * torch.float32.itemsize,
    }


def boundary_bytes(
    ops: Sequence[Op],
    plan: StepPlan,
    input_bytes: Sequence[int],
    kept_bytes: Callable[[int, int], int] = lambda unit, micro_batch: 0,
) -> dict[str, int]:
    """The most that inputs of layers take, on the device and in host memory, and the slots through
    which they come back.

    ops: one step. input_bytes: of a layer's input, for each micro-batch. kept_bytes: what layer `unit`
    holds beside its input when it keeps its activations.
    """

    def num_bytes(buffer: Buffer, op: Op) -> tuple[str, int] | None:
        if buffer.region == "input":
            return "boundaries", input_bytes[buffer.micro_batch]
        if buffer.region == "boundary":
            return "spilled", input_bytes[buffer.micro_batch]
        if buffer.region == "graph" and op.policy == KEEP:
            return "kept", kept_bytes(buffer.index, buffer.micro_batch)
        return None

    spills = any(op.kind == "X" for op in ops)
    peaks = {"boundaries": 0, "spilled": 0, "kept": 0} | peaks_in_order(ops, num_bytes)
    return peaks | {"boundary_slots": plan.boundary_slots * max(input_bytes) if spills else 0}
