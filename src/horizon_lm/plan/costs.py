"""The costs of each op of a schedule: seconds on its lane, bytes while it runs, bytes of its results.

Counted work (`plan.work`) becomes seconds here, by the rates of a machine (`machine.profile`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from horizon_lm.engine.policies import Policies
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.packed import packed_bytes, unpacking_bytes
from horizon_lm.memory.regions import StoreSpec, predict_device_bytes, regions
from horizon_lm.memory.shards import UnitShard
from horizon_lm.memory.slots import slot_bytes
from horizon_lm.memory.staging import staged_bytes
from horizon_lm.plan.fleet import Copies, Network
from horizon_lm.plan.outline import Measures, Outline
from horizon_lm.plan.work import ELEMENTWISE, Kernel, Work
from horizon_lm.plan.working_set import Pass, WorkingSet
from horizon_lm.schedule import Buffer, Op, StepSpec
from horizon_lm.schedule.slots import turnaround
from horizon_lm.schedule.step_spec import EXACT, FAST, KEEP, RECOMPUTE

DEVICE, HOST = "device", "host"
# On the CPU, the bytes that unpacking reads and writes in the time of a copied byte: 12.6 M values took 2 and
# 7 ms on the machine of cpu-2core.
_CPU_UNPACKING = {"nf4": 0.4, "int8": 0.15}


def kernel_seconds(kernel: Kernel, profile: Profile) -> float:
    """Seconds of one operation: arithmetic or memory traffic, and the fixed time of any operation."""
    return kernel.amount / profile.rates(kernel.kind).of(kernel.dtype) + profile.operation_seconds


def work_seconds(work: Work, profile: Profile) -> float:
    return sum(count * kernel_seconds(kernel, profile) for kernel, count in work.items())


@dataclass(frozen=True)
class Costs:
    """Costs of the ops of one step of `plan`, whose micro-batches have one shape.

    With several ranks those of one, which holds a share of each unit. profile: the rank's share of its
    machine. total: micro-batches of all ranks. network: None with one rank, whose collectives copy.
    """

    outline: Outline
    measures: Measures
    policies: Policies
    plan: StepSpec
    spec: StoreSpec
    profile: Profile
    total: int
    network: Network | None = None

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

    @cached_property
    def shards(self) -> tuple[UnitShard, ...]:
        """What the rank holds of each unit."""
        return tuple(self.spec.cut(u, unit) for u, unit in enumerate(self.outline.units))

    # Bytes.

    def fixed_bytes(self) -> dict[str, int]:
        """Device buffers that live as long as the run."""
        plan = self.plan
        spills = any(plan.is_spilled(u) for u in range(1, plan.head))
        if self.is_cpu and not plan.is_shared:
            parts = self.policies.cpu_slot_bytes(plan, self._token_counts, self.spec.dtype)
            parts["waiting_gradients"] = self._waiting_bytes()
        else:
            packing, dtype = self.spec.packing, self.spec.dtype
            parts = slot_bytes(self.outline.units, plan, dtype, stages=not self.is_cpu, packing=packing)
            parts["boundary_slots"] = plan.boundary_slots * self.boundary if spills and not self.is_cpu else 0
        parts |= predict_device_bytes(self.outline.units, self.spec)
        return {name: size for name, size in parts.items() if size}

    def _waiting_bytes(self) -> int:
        """On the CPU two gradients are added at a time, and the first waits in autograd's memory: those of
        units that are visited together, or of one unit if rounds have one micro-batch."""
        plan, units = self.plan, self.outline.units
        sizes = {
            u: units[u].trainable_numel
            for u in plan.trainable
            if self.policies.adds_gradients(u, self._token_counts)
        }
        together = sum if plan.round_size > 1 else max
        visits = plan.visits[turnaround(plan) :]
        return max(together(sizes.get(u, 0) for u in visit) for visit in visits) * self.spec.dtype.itemsize

    def num_bytes(self, buffer: Buffer, op: Op) -> tuple[str, int] | None:
        """Bytes of a transient buffer, by the op that writes it first; see `schedule.simulate`."""
        region = buffer.region
        if region in ("input", "input_grad"):
            return self.device_memory, self.boundary
        if region == "boundary":
            return HOST, self.boundary
        if region in ("rows", "row_grads"):
            several = region == "row_grads" and self._sums_rows_here
            dtype = torch.float32 if several else self.spec.dtype
            return self.device_memory, self._row_elements * dtype.itemsize
        if region == "row_sums":
            return self.device_memory, self._row_share * torch.float32.itemsize
        if region == "call":
            return self.device_memory, self.measures.ends.call
        if region == "graph":
            return self.device_memory, self._layer(buffer.index).under(op.policy).held
        return None

    def working_bytes(self, op: Op) -> tuple[str, int] | None:
        """Bytes that an op takes besides its inputs and results."""
        given = 0
        if op.kind == "V":
            return self.device_memory, self._rows_bytes(op)
        if op.kind == "Q":
            numel = self.shards[op.unit].layout.packed_numel
            return self.device_memory, unpacking_bytes(numel, self.spec.packing, self.spec.dtype, self.is_cpu)
        if op.kind not in "FBCLE":
            return None
        found = self._pass(op)
        if op.unit == 0:
            return self.device_memory, self._prologue_bytes(op, found)
        if op.kind in "FC":
            held = self._layer(op.unit).under(op.policy).held if op.policy else 0
            given = self.boundary + held
        elif op.kind == "B":
            given = self._layer(op.unit).under(self._found(op.unit)).held
        elif op.kind == "L":
            given = self.boundary
        return self.device_memory, max(0, found.bytes - given)

    def _prologue_bytes(self, op: Op, found: Pass) -> int:
        if op.kind == "F":
            return found.bytes
        measured = self._table_elements * self.spec.dtype.itemsize if self.plan.sums_rows else 0
        size, several = self.spec.dtype.itemsize, self._sums_rows_here
        # The gradient of all rows, in addition to their sum; with one micro-batch they are the same.
        most = found.bytes - measured + self._row_elements * size * (several and self.plan.sums_rows)
        if op.table_grad >= 0:
            last = (size if several else 0) + (size + (4 if several else size) if self.plan.tied else 0)
            most = max(most, self._row_elements * last)
        return max(0, most)

    def _rows_bytes(self, op: Op) -> int:
        """V: the gradients of rows that are sent and received, then the sums of all ranks."""
        size, elements = self._contribution(0).itemsize, self._row_share * self.plan.world
        return elements * (max(2 * size, size + 4) if op.grad_shard >= 0 else 2 * size)

    # Seconds.

    def seconds(self, op: Op) -> float:
        """Seconds of an op on its lane."""
        if op.kind in "FBCLE":
            key = op.kind, op.policy, self._kind(op.unit), self._found(op.unit), self._touches_rows(op)
            if key not in self._seconds:
                self._seconds[key] = work_seconds(self.work_of(op), self.profile)
            return self._seconds[key]
        profile = self.profile
        if op.kind == "U":
            return 0.0 if self.is_cpu else self._weight_bytes(op.unit) / profile.h2d
        if op.kind == "Q":
            return self._unpacking_seconds(op.unit)
        if op.kind in "JTV":
            return self._network_seconds(op)
        if op.kind in "XR":
            return 0.0 if self.is_cpu else self.boundary / (profile.d2h if op.kind == "X" else profile.h2d)
        if op.kind == "D":
            return self._download_seconds(op.unit)
        if op.kind == "N":
            return self._norm_seconds()
        numel, is_eager = self.shards[op.unit].trainable_share, self.plan.update == "eager"
        if op.kind in "PGS":
            return numel * self._sum_seconds(op)
        agreed = self.network.exchange_seconds if is_eager and self.network is not None else 0.0
        if op.kind == "A":  # eager updates read the fp32 gradient in its slot
            size = torch.float32.itemsize if is_eager else self.spec.dtype.itemsize
            return numel * (self.state_bytes + size) / self._device_rate + agreed
        return 0.0 if op.kind == "W" else numel * self.update_bytes / profile.optimizer + agreed

    def _weight_bytes(self, unit: int) -> int:
        """Bytes of a unit's weights that the rank holds: what it uploads, residuals of wide ones included;
        of a split unit the frozen part, packed parts as they are stored."""
        share, spec = self.shards[unit], self.spec
        if unit in self.plan.packed:
            return staged_bytes(share.layout, unit in self.plan.split, spec.dtype, spec.packing)
        if unit in self.plan.split:
            return share.layout.wide_offset * spec.dtype.itemsize
        return (share.weights_numel + share.wide_numel) * self.spec.dtype.itemsize

    def _unpacking_seconds(self, unit: int) -> float:
        """Q reads what was uploaded and writes the weights; on the CPU of packed parts alone."""
        layout, spec = self.outline.units[unit], self.spec
        if self.is_cpu:
            moved = packed_bytes(layout.packed_numel, spec.packing)
            moved += layout.packed_numel * spec.dtype.itemsize
            return moved / (self.profile.host * _CPU_UNPACKING[spec.packing])
        numel = layout.wide_offset if unit in self.plan.split else layout.slot_numel
        return (self._weight_bytes(unit) + numel * spec.dtype.itemsize) / self._device_rate

    def _network_seconds(self, op: Op) -> float:
        """J gathers weights; T and V send gradients to their owners, who add them (engine/sharded.py)."""
        network, world = self.network or self._copies, self.plan.world
        if op.kind == "J":
            share = self.shards[op.unit]
            sizes = (share.frozen_share, share.trainable_share, share.frozen_wide_share, share.wide_share)
            least = network.least_seconds * (sum(map(bool, sizes)) - 1)
            return network.gather_seconds(world * self._weight_bytes(op.unit)) + least
        numel = self._row_share if op.kind == "V" else self.shards[op.unit].trainable_share
        size = self._contribution(op.unit).itemsize
        if self.plan.reduction == FAST:
            seconds = network.gather_seconds(world * numel * size)
            adds = 0 if op.first else numel * 12
        else:
            seconds = network.all_to_all_seconds(world * numel * size)
            adds = numel * (world * (size + 8) - 4 * op.first)  # each reads its part, and the sum again
        if op.kind == "V" and op.grad_shard >= 0:
            seconds += network.gather_seconds(world * numel * 4)
        return seconds + adds / self._device_rate

    @property
    def _copies(self) -> Copies:
        """What one rank does in place of collectives."""
        return Copies(self._device_rate)

    def _contribution(self, unit: int) -> torch.dtype:
        """In which dtype ranks send a unit's gradient; 0: those of rows."""
        adds_in_fp32 = not self.is_cpu
        return self.policies.contribution_dtype(
            unit, self._token_counts, self.spec.dtype, adds_in_fp32=adds_in_fp32
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and optimizer state per parameter that an update reads and writes."""
        return sum(2 * row.dtype.itemsize for row in regions(self.spec) if row.is_updated)

    @property
    def update_bytes(self) -> int:
        """Bytes per parameter that an update reads and writes; gradients are only read."""
        return self.state_bytes + self.spec.dtype.itemsize

    @property
    def _device_rate(self) -> float:
        """Bytes a second that an update or a copy on the device reads and writes."""
        profile = self.profile
        return profile.optimizer if self.is_cpu else profile.elementwise.of(self._dtype_name)

    @property
    def _dtype_name(self) -> str:
        return str(self.spec.dtype).removeprefix("torch.")

    def _sum_seconds(self, op: Op) -> float:
        """Seconds per parameter of moving an fp32 sum between rounds, or of adding a micro-batch's gradient,
        which has the store's dtype, on the host."""
        profile, size = self.profile, torch.float32.itemsize
        if op.kind == "S":
            return (self.spec.dtype.itemsize + 2 * size) / profile.optimizer
        if op.sum_slab >= 0:
            size = self.spec.dtype.itemsize
        if self.is_cpu:
            return 2 * size / profile.host
        return size / (profile.d2h if op.kind == "P" else profile.h2d)

    def _download_seconds(self, unit: int) -> float:
        numel, size = self.shards[unit].trainable_share, self.spec.dtype.itemsize
        if not self.is_cpu and unit in self.plan.resident:  # read for its norm, and written rounded
            return numel * (self._gradient_dtype(unit).itemsize + size) / self._device_rate
        if not self.is_cpu:
            return numel * size / self.profile.d2h
        if self._gradient_dtype(unit) != self.spec.dtype or self.plan.is_shared:
            return numel * (4 + size) / self.profile.host
        return numel * size / self.profile.host if self.plan.update == "eager" else 0.0

    def _norm_seconds(self) -> float:
        """A pass over gradients written in the store; the others were measured as they were copied there.
        With several ranks, sums from rank to rank."""
        if self.network is not None:
            return self.network.pass_on_seconds
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
    def _table_elements(self) -> int:
        """Elements of the table that replaced the embedding table when the prologue was measured."""
        return self.measures.batch * self.measures.tokens * self.outline.width

    @property
    def _row_elements(self) -> int:
        """Maximum elements of the embedding rows that a step can use."""
        rows = self.outline.facts.rows * self.outline.width
        return min(self._table_elements * self.total, rows)

    @property
    def _row_share(self) -> int:
        """Those of which each rank adds up the gradients."""
        return -(-self._row_elements // self.plan.world)

    @property
    def _sums_rows_here(self) -> bool:
        """Whether the rank adds up gradients of rows over its micro-batches, in fp32."""
        return self.total > 1 and self.plan.reduction != EXACT

    def _touches_rows(self, op: Op) -> int:
        """A code for what a prologue op does with all rows of the step: take them, add to their sum, add the
        sum to the table's gradient."""
        return sum(b.region in ("rows", "row_grads") for b in op.writes) + 2 * (op.table_grad >= 0)

    def _row_work(self, op: Op) -> Work:
        """Work of an op on all rows of the step (see `_touches_rows`): bytes read and written."""
        size, several = self.spec.dtype.itemsize, self._sums_rows_here
        kinds: list[int] = []
        if op.kind == "F" and self._touches_rows(op):
            kinds.append(2 * size * self._row_elements)
        elif op.kind == "B" and self._touches_rows(op):
            if several:
                kinds.append((size + 8) * self._row_elements)
            if op.table_grad >= 0:
                table = 0 if self.plan.tied else self.outline.units[self.plan.embedding_unit].trainable_numel
                kinds.append(size * table + (4 * size if self.plan.tied else 2 * size) * self._row_elements)
        return Work(Kernel(ELEMENTWISE, self._dtype_name, 0, count) for count in kinds)

    @property
    def _token_counts(self) -> list[int]:
        """Tokens of each micro-batch of all ranks."""
        return [self.measures.batch * self.measures.tokens] * self.total

    def _gradient_dtype(self, unit: int) -> torch.dtype:
        return self.policies.gradient_dtype(unit, self._token_counts, self.spec.dtype)

    def _kind(self, unit: int) -> int:
        return self.outline.kind_of[unit - 1] if 0 < unit < self.plan.head else -1 - (unit > 0)

    def _layer(self, unit: int) -> WorkingSet:
        return self.measures.layers[self._kind(unit)]

    def _found(self, unit: int) -> str:
        """The policy that left what a layer's backward pass finds: its forward's, or `keep` if an op of its
        own (C) recomputes it within a block; nothing for other units."""
        inside = 0 < unit < self.plan.head and unit not in self._last
        return KEEP if inside else self.plan.policy(unit)

    @cached_property
    def _last(self) -> frozenset[int]:
        return frozenset(block[-1] for block in self.plan.blocks)

    def work_of(self, op: Op) -> Work:
        """The work of an op on the compute lane."""
        found = self._pass(op).work
        return found + self._row_work(op) if op.unit == 0 else found

    def _pass(self, op: Op) -> Pass:
        ends = self.measures.ends
        if op.unit == 0:
            return ends.forward if op.kind == "F" else ends.backward
        if op.unit == self.plan.head:
            return ends.score if op.kind == "E" else ends.loss
        layer = self._layer(op.unit)
        if op.kind in "FC":
            return layer.under(op.policy or RECOMPUTE).forward
        return layer.under(self._found(op.unit)).backward
