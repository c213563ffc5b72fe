"""Every fault of a schedule, as a sentence: order, value, waste and room.

The checker knows only what ops say they read and write, and trusts nothing of the builder: it is
run over two steps in a row, so that the seam between them is checked as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from horizon_lm.schedule.ops import Buffer, Lane, Op
from horizon_lm.schedule.step_spec import StepSpec
from horizon_lm.schedule.waits import derive_waits

# Regions that live on between steps; everything else must be written in a step before it is read.
PERSISTENT = frozenset({"weights", "state"})


def check(ops: Sequence[Op], spec: StepSpec, waits: Sequence[tuple[int, ...]] | None = None) -> list[str]:
    """All faults found in `ops` (program order, one or more whole steps); empty when sound.

    waits: per op the indices of the ops that it waits for; derived when not given.
    """
    if waits is None:
        waits = derive_waits(ops)
    return [
        *_check_order(ops, waits),
        *_check_value(ops, spec),
        *_check_complete(ops, spec),
        *_check_waste(ops, waits),
        *_check_room(ops, spec),
    ]


def ends_before(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[int]:
    """For each op the bit set of ops that surely end before it starts, whatever the lanes do."""
    known: list[int] = []
    last: dict[Lane, int] = {}
    for i, op in enumerate(ops):
        bits = 0
        previous = [last[op.lane]] if op.lane in last else []
        for j in [*previous, *waits[i]]:
            bits |= known[j] | 1 << j
        known.append(bits)
        last[op.lane] = i
    return known


def _check_order(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[str]:
    """Any two ops of which one writes what the other touches are ordered."""
    faults = []
    for i, targets in enumerate(waits):
        faults += [f"{ops[i]} waits for {ops[j]}, which comes later" for j in targets if j >= i]
    if faults:
        return faults
    known = ends_before(ops, waits)
    touched: dict[Buffer, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        for buffer in sorted(op.reads | op.writes):
            for j in touched[buffer]:
                writes = buffer in op.writes or buffer in ops[j].writes
                if writes and not known[i] >> j & 1:
                    faults.append(
                        f"{op} ({op.lane}, step {op.step}) may run before {ops[j]} ({ops[j].lane}, "
                        f"step {ops[j].step}) has ended; both touch {buffer}"
                    )
            touched[buffer].append(i)
    return faults


def _check_value(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Each read finds what it expects: of the right unit, step and micro-batches."""
    faults = []
    first_step = min((op.step for op in ops), default=0)
    holds: dict[Buffer, tuple[int, int]] = {}  # (unit, step) of the last writer
    added: dict[Buffer, list[int]] = {}  # micro-batches whose gradient is in a gradient slot
    for op in ops:
        for buffer in sorted(op.reads):
            unit, step = holds.get(buffer, (-1, first_step - 1))
            where = f"{op} of step {op.step}"
            if buffer.region == "slot" and (unit, step) != (op.unit, op.step):
                faults.append(f"{where} needs unit {op.unit} in {buffer}, which holds {unit} of step {step}")
            elif buffer.region == "grad_slot" and (unit, step) != (op.unit, op.step):
                faults.append(
                    f"{where} needs the gradient of unit {op.unit} in {buffer}, "
                    f"which holds that of unit {unit} of step {step}"
                )
            elif buffer.region == "slab" and (unit, step) != (_slab_owner(op, spec), op.step):
                faults.append(
                    f"{where} needs the gradient of unit {_slab_owner(op, spec)} in {buffer}, "
                    f"which holds that of unit {unit} of step {step}"
                )
            elif buffer.region == "boundary_slot" and (unit, added.get(buffer)) != (
                op.unit,
                [op.micro_batch],
            ):
                faults.append(
                    f"{where} needs the input of unit {op.unit} in {buffer}, which holds that of {unit} "
                    f"and micro-batches {added.get(buffer)}"
                )
            elif buffer.region in PERSISTENT:
                if buffer.index in spec.trainable and step != op.step - 1:
                    faults.append(f"{where} reads {buffer} of after step {step} instead of {op.step - 1}")
            elif step != op.step:
                faults.append(f"{where} reads {buffer}, which this step has not written")
            elif buffer.region == "input_grad" and unit != op.unit + 1:
                faults.append(
                    f"{where} reads {buffer}, which comes from unit {unit} instead of {op.unit + 1}"
                )
            if op.kind == "D" and added.get(buffer) != list(range(spec.micro_batches)):
                faults.append(f"{where} takes {buffer} with micro-batches {added.get(buffer, [])} in it")
        if op.kind in "FLECB" and op.unit in spec.uploaded and op.slot < 0:
            faults.append(f"{op} of step {op.step} has no slot to read its weights from")
        if op.kind in "LBD" and op.unit in spec.trainable and op.grad_slot < 0:
            faults.append(f"{op} of step {op.step} has no gradient slot")
        if op.policy != spec.policy(op.unit) and op.kind == "F" and op.unit:
            faults.append(f"{op} of step {op.step} keeps {op.policy!r} instead of {spec.policy(op.unit)!r}")
        for buffer in op.writes:
            holds[buffer] = (_slab_owner(op, spec) if buffer.region == "slab" else op.unit, op.step)
            if buffer.region == "boundary_slot":
                added[buffer] = [op.micro_batch]
            if buffer.region == "grad_slot" and op.kind in "LB":
                if op.first == (buffer in op.reads):
                    faults.append(f"{op} of step {op.step} has first={op.first}, but declares otherwise")
                added[buffer] = [*([] if op.first else added.get(buffer, [])), op.micro_batch]
    return faults


def _slab_owner(op: Op, spec: StepSpec) -> int:
    return spec.embedding_unit if op.kind == "S" else op.unit


def _check_complete(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Each unit does its work exactly once a step for each micro-batch, and nothing else is done."""
    expected = _expected(spec)
    counts = Counter((op.step, op.kind, op.unit, op.micro_batch) for op in ops if op.kind != "U")
    wanted = {(step, *key) for step in {op.step for op in ops} for key in expected}
    return [
        f"step {step} runs {Op(kind, unit, m)} {counts[step, kind, unit, m]} times instead of "
        f"{'once' if (step, kind, unit, m) in wanted else 'never'}"
        for step, kind, unit, m in sorted(wanted | counts.keys())
        if counts[step, kind, unit, m] != ((step, kind, unit, m) in wanted)
    ]


def _expected(spec: StepSpec) -> set[tuple[str, int, int]]:
    """(kind, unit, micro-batch) of all ops of a step but the uploads."""
    micro_batches = range(spec.micro_batches)
    per_micro_batch = {("G", -1), *(("F", u) for u in range(spec.head))}
    if spec.evaluate:
        return {(*key, m) for key in per_micro_batch | {("E", spec.head)} for m in micro_batches}
    per_micro_batch |= {("L", spec.head), *(("B", u) for u in range(spec.lowest_backward, spec.head))}
    per_micro_batch |= {("C", u) for block in spec.backward_blocks for u in block[:-1]}
    per_micro_batch |= {(kind, u) for u in range(1, spec.head) if spec.is_spilled(u) for kind in "XR"}
    expected = {(*key, m) for key in per_micro_batch for m in micro_batches}
    expected |= {("D", u, -1) for u in spec.trainable if u <= spec.head}
    expected |= {("S", -1, -1)} if spec.scatters else set()
    expected |= {("W", u, -1) for u in spec.saved}
    return expected | {("N", -1, -1)} | {("O", u, -1) for u in spec.trainable}


def _check_waste(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[str]:
    """No upload that nothing reads, no wait that follows from others."""
    faults = []
    unread: dict[Buffer, Op] = {}
    for op in ops:
        for buffer in op.reads:
            unread.pop(buffer, None)
        for buffer in op.writes:
            if buffer in unread and buffer not in op.reads:
                faults.append(
                    f"{unread[buffer]} fills {buffer} and nothing reads it before {op} overwrites it"
                )
            if op.kind in "UR":
                unread[buffer] = op
    faults += [f"{op} fills {buffer} and nothing reads it" for buffer, op in unread.items()]
    minimal = derive_waits(ops)
    for i, given in enumerate(waits):
        faults += [
            f"{ops[i]} waits for {ops[j]}, which other waits imply" for j in given if j not in minimal[i]
        ]
    return faults


def _check_room(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Slots stay within the number that is allocated, and an op uses those that it declares."""
    faults = []
    for op in ops:
        for region, own, count in (
            ("slot", op.slot, spec.slots),
            ("grad_slot", op.grad_slot, spec.grad_slots),
            ("slab", op.slab, spec.grad_slabs + 1 if spec.update == "eager" else 0),
            ("boundary_slot", op.boundary_slot, spec.boundary_slots),
        ):
            declared = sorted(b.index for b in op.reads | op.writes if b.region == region)
            faults += [
                f"{op} uses {region}.{k}, but only {count} are allocated" for k in declared if k >= count
            ]
            if declared != [own] * (own >= 0):
                faults.append(f"{op} works on {region} {own}, but declares {declared}")
    return faults
