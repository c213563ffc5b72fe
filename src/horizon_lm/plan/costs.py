"""The costs of each op of a schedule: seconds on its lane, bytes while it runs, bytes of its results.

Counted work (`plan.work`) becomes seconds here, by the rates of a machine (`machine.profile`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from horizon_lm.engine.policies import Policies
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.slots import slot_bytes
from horizon_lm.memory.store import StoreSpec, regions
from horizon_lm.plan.outline import Measures, Outline
from horizon_lm.plan.work import Kernel, Work
from horizon_lm.plan.working_set import Pass, WorkingSet
from horizon_lm.schedule import Buffer, Op, StepSpec
from horizon_lm.schedule.step_spec import KEEP

DEVICE, HOST = "device", "host"


def kernel_seconds(kernel: Kernel, profile: Profile) -> float:
    """Seconds of one operation: arithmetic or memory traffic, and the fixed time of any operation."""
    return kernel.amount / profile.rates(kernel.kind).of(kernel.dtype) + profile.operation_seconds


def work_seconds(work: Work, profile: Profile) -> float:
    return sum(count * kernel_seconds(kernel, profile) for kernel, count in work.items())


@dataclass(frozen=True)
class Costs:
    """Costs of the ops of one step of `plan`, whose micro-batches have one shape."""

    outline: Outline
    measures: Measures
    policies: Policies
    plan: StepSpec
    spec: StoreSpec
    profile: Profile

    @property
    def is_cpu(self) -> bool:
        """Whether slots alias the store: everything lies in host memory."""
        return self.profile.device == "cpu"

    @property
    def boundary(self) -> int:
        return self.measures.layers[0].boundary

    @property
    def device_memory(self) -> str:
        return HOST if self.is_cpu else DEVICE

    # Bytes.

    def fixed_bytes(self) -> dict[str, int]:
        """Device buffers that live as long as the run."""
        plan = self.plan
        spills = any(plan.is_spilled(u) for u in range(1, plan.head))
        parts = slot_bytes(self.outline.units, plan, self.spec.dtype)
        parts["boundary_slots"] = plan.boundary_slots * self.boundary if spills else 0
        if self.is_cpu:
            widened = any(
                self._gradient_dtype(u) != self.spec.dtype for u in plan.trainable if u <= plan.head
            )
            parts = {"gradient_slots": parts["gradient_slots"] if widened else 0}
            parts["waiting_gradients"] = self._waiting_bytes()
        return {name: size for name, size in parts.items() if size}

    def _waiting_bytes(self) -> int:
        """On the CPU two gradients are added at a time, and the first waits in autograd's memory: that of one
        layer, plus the head's if micro-batches pass the turnaround one by one."""
        plan, units = self.plan, self.outline.units
        counts = [self.measures.batch * self.measures.tokens] * plan.micro_batches
        sizes = {u: units[u].trainable_numel for u in plan.trainable if u <= plan.head}
        adds = {u: n for u, n in sizes.items() if self.policies.adds_gradients(u, counts)}
        head = adds.pop(plan.head, 0)
        layer = max(adds.values(), default=0)
        return (head + layer if plan.joins_turnaround else max(head, layer)) * self.spec.dtype.itemsize

    def num_bytes(self, buffer: Buffer, op: Op) -> tuple[str, int] | None:
        """Bytes of a transient buffer, by the op that writes it first; see `schedule.simulate`."""
        region = buffer.region
        if region in ("input", "input_grad"):
            return self.device_memory, self.boundary
        if region in ("embeds", "embeds_grad", "boundary"):
            return HOST, self.boundary
        if region == "call":
            return self.device_memory, self.measures.ends.call
        if region == "graph":
            layer = self._layer(buffer.index)
            return self.device_memory, layer.kept if op.policy == KEEP else layer.held
        return None

    def working_bytes(self, op: Op) -> tuple[str, int] | None:
        """Bytes that an op takes besides its inputs and results."""
        given = 0
        if op.kind == "S":
            return HOST, self._rows * self.outline.width * (2 * self.spec.dtype.itemsize + 4)
        if op.kind not in "FBCLE":
            return None
        found = self._pass(op)
        if op.kind == "F" and op.unit == 0 or op.kind == "B" and op.unit == 0:
            given = self.boundary if self.is_cpu or op.kind == "B" else 0
        elif op.kind in "FC":
            layer = self._layer(op.unit)
            given = self.boundary + (layer.kept if op.policy == KEEP else layer.held if op.policy else 0)
        elif op.kind == "B":
            layer = self._layer(op.unit)
            given = layer.kept if self._was_kept(op.unit) else layer.held
        elif op.kind == "L":
            given = self.boundary
        return self.device_memory, max(0, found.bytes - given)

    # Seconds.

    def seconds(self, op: Op) -> float:
        """Seconds of an op on its lane."""
        if op.kind in "FBCLE":
            key = op.kind, op.policy, self._kind(op.unit), self._was_kept(op.unit)
            if key not in self._seconds:
                self._seconds[key] = work_seconds(self._pass(op).work, self.profile)
            return self._seconds[key]
        profile = self.profile
        if op.kind == "G":
            return 2 * self.boundary / profile.host
        if op.kind == "U":
            unit = self.outline.units[op.unit]
            return 0.0 if self.is_cpu else unit.slot_numel * self.spec.dtype.itemsize / profile.h2d
        if op.kind in "XR":
            return 0.0 if self.is_cpu else self.boundary / (profile.d2h if op.kind == "X" else profile.h2d)
        if op.kind == "D":
            return self._download_seconds(op.unit)
        if op.kind == "S":
            table = self.outline.units[self.plan.embedding_unit].trainable_numel if not self.plan.tied else 0
            rows = self._rows * self.outline.width * 4 * torch.float32.itemsize
            return (table * self.spec.dtype.itemsize + rows) / profile.host
        if op.kind == "N":
            return self._norm_seconds()
        return self.outline.units[op.unit].trainable_numel * self.update_bytes / profile.optimizer

    @property
    def update_bytes(self) -> int:
        """Bytes per parameter that an update reads and writes; gradients are only read."""
        return sum(r.dtype.itemsize * (1 if r.name.startswith("grad") else 2) for r in regions(self.spec))

    def _download_seconds(self, unit: int) -> float:
        numel, size = self.outline.units[unit].trainable_numel, self.spec.dtype.itemsize
        if not self.is_cpu:
            return numel * size / self.profile.d2h
        if self._gradient_dtype(unit) != self.spec.dtype:
            return numel * (4 + size) / self.profile.host
        return numel * size / self.profile.host if self.plan.update == "eager" else 0.0

    def _norm_seconds(self) -> float:
        """A pass over gradients written in the store; the others were measured as they were copied there."""
        if not self.is_cpu or self.plan.update == "eager":
            return 0.0
        units = self.outline.units
        in_store = (u for u in self.plan.trainable if self._gradient_dtype(u) == self.spec.dtype)
        return sum(units[u].trainable_numel for u in in_store) * self.spec.dtype.itemsize / self.profile.host

    # The model's parts.

    @cached_property
    def _seconds(self) -> dict[tuple, float]:
        return {}

    @property
    def _rows(self) -> int:
        """The most rows of the embedding table that a step can use."""
        tokens = self.measures.batch * self.measures.tokens * self.plan.micro_batches
        return min(tokens, self.outline.facts.rows)

    def _gradient_dtype(self, unit: int) -> torch.dtype:
        counts = [self.measures.batch * self.measures.tokens] * self.plan.micro_batches
        return self.policies.gradient_dtype(unit, counts, self.spec.dtype)

    def _kind(self, unit: int) -> int:
        return self.outline.kind_of[unit - 1] if 0 < unit < self.plan.head else -1 - (unit > 0)

    def _layer(self, unit: int) -> WorkingSet:
        return self.measures.layers[self._kind(unit)]

    def _was_kept(self, unit: int) -> bool:
        """Whether a layer's backward pass finds its activations: kept by its forward, or recomputed by an op
        of their own (C) within a block."""
        return self.plan.policy(unit) == KEEP or (0 < unit < self.plan.head and unit not in self._last)

    @cached_property
    def _last(self) -> frozenset[int]:
        return frozenset(block[-1] for block in self.plan.blocks)

    def work_of(self, op: Op) -> Work:
        """The work of an op on the compute lane."""
        return self._pass(op).work

    def _pass(self, op: Op) -> Pass:
        ends = self.measures.ends
        if op.unit == 0:
            return ends.forward if op.kind == "F" else ends.backward
        if op.unit == self.plan.head:
            return ends.loss
        layer = self._layer(op.unit)
        if op.kind in "FC":
            return layer.keep_forward if op.policy == KEEP else layer.forward
        return layer.keep_backward if self._was_kept(op.unit) else layer.backward
