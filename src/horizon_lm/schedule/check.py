"""Check a schedule for order, value, completeness, waste and room; report each defect as a sentence.

The checker uses only what ops declare to read and write, and trusts nothing of the builder. Run it over two
consecutive steps to check the seam between them too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from horizon_lm.schedule.ops import Buffer, Lane, Op
from horizon_lm.schedule.step_spec import EXACT, SUM_SLABS, StepSpec
from horizon_lm.schedule.waits import derive_waits

# Regions that persist between steps; all others must be written in a step before they are read.
PERSISTENT = frozenset({"weights", "state"})
_FROZEN = frozenset({"frozen", "packed"})  # those of them that nothing writes
_GRADIENTS = ("grad_slot", "grad_shard", "slab", "sum", "sum_slab")
# Kinds with `first`, and the region that they overwrite then.
_BEGUN_BY_FIRST = {
    ("L", "grad_slot"),
    ("B", "grad_slot"),
    ("S", "sum"),
    ("T", "grad_shard"),
    ("V", "row_sums"),
}
# In a shared step: the kinds of op for which a region holds the right elements, whole units or shares.
_USERS_OF_SHARES = {
    "weights": "UJOAW",
    "shard": "UJ",
    "slot": "JFLECB",
    "grad_slot": "LBT",
    "grad_shard": "TVPGDA",
    "row_grads": "BV",
    "row_sums": "V",
}


def check(ops: Sequence[Op], spec: StepSpec, waits: Sequence[tuple[int, ...]] | None = None) -> list[str]:
    """Return all errors in `ops` (program order, one or more whole steps); empty if sound.

    waits: per op the indices of the ops it waits for; derived by default.
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
    """For each op, the bit set of ops guaranteed to end before it starts, whatever the lanes do."""
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
    """Check that two ops are ordered if one writes what the other touches."""
    errors = []
    for i, targets in enumerate(waits):
        errors += [f"{ops[i]} waits for {ops[j]}, which comes later" for j in targets if j >= i]
    if errors:
        return errors
    known = ends_before(ops, waits)
    touched: dict[Buffer, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        for buffer in sorted(op.reads | op.writes):
            for j in touched[buffer]:
                writes = buffer in op.writes or buffer in ops[j].writes
                if writes and not known[i] >> j & 1:
                    errors.append(
                        f"{op} ({op.lane}, step {op.step}) may run before {ops[j]} ({ops[j].lane}, "
                        f"step {ops[j].step}) has ended; both touch {buffer}"
                    )
            touched[buffer].append(i)
    return errors


def _check_value(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Check that each read finds data of the right unit, step and micro-batches."""
    errors = []
    first_step = min((op.step for op in ops), default=0)
    holds: dict[Buffer, tuple[int, int]] = {}  # (unit, step) of the last writer
    added: dict[Buffer, list[int]] = {}  # micro-batches whose gradient is in a buffer
    for op in ops:
        where = f"{op} of step {op.step}"
        for buffer in sorted(op.reads):
            unit, step = holds.get(buffer, (-1, first_step - 1))
            fault = _wrong_content(op, buffer, (unit, step), added.get(buffer), spec)
            errors += [f"{where} {fault}"] * bool(fault)
            wanted = _wanted(op, buffer, spec)
            if wanted is not None and added.get(buffer) != wanted:
                errors.append(f"{where} takes {buffer} with micro-batches {added.get(buffer, [])} in it")
        errors += [f"{where} {fault}" for fault in _wrong_places(op, spec)]
        for buffer in op.writes:
            holds[buffer] = _owner(op, buffer, spec), op.step
        errors += _note_added(op, added)
    return errors


def _wrong_content(
    op: Op, buffer: Buffer, held: tuple[int, int], added: list[int] | None, spec: StepSpec
) -> str:
    """Say what is wrong with what an op reads. held: unit and step of its last writer."""
    unit, step = held
    owner = _owner(op, buffer, spec)
    if buffer.region in ("slot", "staging", "shard") and held != (owner, op.step):
        return f"needs unit {owner} in {buffer}, which holds {unit} of step {step}"
    if buffer.region in _GRADIENTS and held != (owner, op.step):
        return (
            f"needs the gradient of unit {owner} in {buffer}, which holds that of unit {unit} of step {step}"
        )
    if buffer.region == "boundary_slot" and (unit, added) != (op.unit, [op.micro_batch]):
        return (
            f"needs the input of unit {op.unit} in {buffer}, which holds that of {unit} "
            f"and micro-batches {added}"
        )
    if buffer.region in _FROZEN:
        return f"reads {buffer} of another unit" if buffer.index != op.unit else ""
    if buffer.region in PERSISTENT:
        if buffer.index in spec.trainable and step != op.step - 1:
            return f"reads {buffer} of after step {step} instead of {op.step - 1}"
    elif step != op.step:
        return f"reads {buffer}, which this step has not written"
    elif buffer.region == "input_grad" and unit != op.unit + 1:
        return f"reads {buffer}, which comes from unit {unit} instead of {op.unit + 1}"
    return ""


def _wrong_places(op: Op, spec: StepSpec) -> Iterator[str]:
    """Yield what is wrong with where an op finds and puts its unit's weights and gradient."""
    shared = spec.is_shared
    computes, table = op.kind in "FLECB", op.kind == "F" and op.unit == 0
    if (computes or op.kind == "J") and op.unit in spec.in_slots and op.slot < 0:
        yield "has no slot to read its weights from" if computes else "has no slot"
    if table and op.table < 0 and spec.embedding_unit in spec.in_slots:
        yield "has no slot to read the embedding table from"
    read = {op.unit, spec.embedding_unit} if table else {op.unit} if computes else set()
    for unit in sorted(({op.unit} if op.kind == "J" else set() if shared else read) & spec.resident):
        if Buffer("weights", unit) not in op.reads:
            yield f"does not read weights.{unit}, where the unit lives"
    if op.kind == "U" and op.unit not in spec.uploaded:
        yield "uploads a unit that is not to be uploaded"
    if op.kind in "UQ" and (op.staging >= 0) != (op.unit in spec.packed):
        yield f"has staging slot {op.staging} for a unit that is {'' if op.staging < 0 else 'not '}packed"
    if op.kind == "U":
        source = "frozen" if op.unit in spec.split else "weights"
        wanted = {Buffer(source, op.unit)} | (
            {Buffer("packed", op.unit)} if op.unit in spec.packed else set()
        )
        if op.reads != wanted:
            yield f"reads {_listed(op.reads)} instead of {_listed(wanted)}"
    if _FROZEN & {buffer.region for buffer in op.writes}:
        yield "writes to frozen weights"
    if shared and op.kind in "UJ" and op.unit in spec.uploaded and op.shard < 0:
        yield "has no buffer of the rank's share"
    if op.kind in ("LBT" if shared else "LBDPG") and op.unit in spec.trainable and op.grad_slot < 0:
        yield "has no gradient slot"
    if shared and op.kind in "TDPG" and op.grad_shard < 0:
        yield "has no buffer of the rank's share of the gradient"
    if op.kind in "OA" and not any(b.region in ("grads", *_GRADIENTS) for b in op.reads):
        yield "reads no gradient"
    if op.policy != spec.policy(op.unit) and op.kind == "F" and op.unit:
        yield f"keeps {op.policy!r} instead of {spec.policy(op.unit)!r}"
    for buffer in sorted(op.reads | op.writes) if shared else ():
        if op.kind not in _USERS_OF_SHARES.get(buffer.region, op.kind):
            yield f"works on {buffer}, which in a shared step it cannot"


def _listed(buffers: Iterable[Buffer]) -> str:
    return ", ".join(map(str, sorted(buffers))) or "nothing"


def _note_added(op: Op, added: dict[Buffer, list[int]]) -> list[str]:
    """Record the micro-batches in each buffer after `op`: those already there, if it adds, and its own."""
    errors = []
    for buffer in sorted(op.writes, reverse=True):  # sums of rows come before the slot that receives them
        before = added.get(buffer, []) if buffer in op.reads else []
        is_table = buffer == Buffer("grad_slot", op.table_grad)
        overwrites = (op.kind, buffer.region) in _BEGUN_BY_FIRST and not is_table
        if overwrites and op.first == (buffer in op.reads):
            errors.append(f"{op} of step {op.step} has first={op.first}, but declares otherwise")
        if buffer.region == "boundary_slot":
            added[buffer] = [op.micro_batch]
        elif op.kind in "PG":
            added[buffer] = [m for source in op.reads for m in added.get(source, [])]
        elif op.kind == "S":
            added[buffer] = [*before, *added.get(Buffer("sum_slab", op.sum_slab), [])]
        elif op.kind == "T" and buffer.region == "grad_shard":
            added[buffer] = [*before, *added.get(Buffer("grad_slot", op.grad_slot), [])]
        elif op.kind == "V":
            has_sums = buffer.region == "grad_shard" and Buffer("row_sums") in op.writes
            source = Buffer("row_sums") if has_sums else Buffer("row_grads")
            added[buffer] = [*before, *added.get(source, [])]
        elif buffer.region == "row_grads":
            added[buffer] = [*before, op.micro_batch]
        elif buffer.region == "grad_slot" and buffer.index == op.table_grad:
            added[buffer] = [*before, *added.get(Buffer("row_grads"), [])]
        elif buffer.region == "grad_slot" and op.kind in "LB":
            added[buffer] = [*([] if op.first else added.get(buffer, [])), op.micro_batch]
    return errors


def _owner(op: Op, buffer: Buffer, spec: StepSpec) -> int:
    """Return the unit whose weights or gradient an op reads or writes in a slot."""
    of_table = {("slot", op.table), ("grad_slot", op.table_grad)}
    if op.kind == "V":
        of_table.add(("grad_shard", op.grad_shard))
    return spec.embedding_unit if (buffer.region, buffer.index) in of_table else op.unit


def _wanted(op: Op, buffer: Buffer, spec: StepSpec) -> list[int] | None:
    """Return the micro-batches that an op must find in a gradient: all in a complete one, after which a tied
    table has those of its rows as well; None if any will do."""
    if op.kind == "D":
        twice = spec.tied and spec.sums_rows and op.unit == spec.embedding_unit
        return [*range(spec.micro_batches)] * (2 if twice else 1)
    if spec.reduction == EXACT and (op.kind, buffer.region) in (("T", "grad_slot"), ("V", "row_grads")):
        return [op.micro_batch]  # each is added by itself
    return None


def _check_complete(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Check that each unit works exactly once per step and micro-batch, and that nothing else runs."""
    expected = _expected(spec)
    fetches = "UJ" if spec.is_shared else "UQ"
    counts = Counter((op.step, op.kind, op.unit, op.micro_batch) for op in ops if op.kind not in fetches)
    wanted = {(step, *key) for step in {op.step for op in ops} for key in expected}
    return [
        f"step {step} runs {Op(kind, unit, m)} {counts[step, kind, unit, m]} times instead of "
        f"{'once' if (step, kind, unit, m) in wanted else 'never'}"
        for step, kind, unit, m in sorted(wanted | counts.keys())
        if counts[step, kind, unit, m] != ((step, kind, unit, m) in wanted)
    ]


def _expected(spec: StepSpec) -> set[tuple[str, int, int]]:
    """(kind, unit, micro-batch) of all ops of a step except uploads and joins."""
    micro_batches = range(spec.micro_batches)
    per_micro_batch = {("F", u) for u in range(spec.head)}
    if spec.evaluate:
        return {(*key, m) for key in per_micro_batch | {("E", spec.head)} for m in micro_batches}
    per_micro_batch |= {("L", spec.head), *(("B", u) for u in range(spec.lowest_backward, spec.head))}
    per_micro_batch |= {("C", u) for block in spec.backward_blocks for u in block[:-1]}
    per_micro_batch |= {(kind, u) for u in range(1, spec.head) if spec.is_spilled(u) for kind in "XR"}
    expected = {(*key, m) for key in per_micro_batch for m in micro_batches}
    for number in range(spec.rounds):
        first, last = spec.micro_batches_of(number)[0], spec.micro_batches_of(number)[-1]
        if last < spec.micro_batches - 1:
            kinds = "PS" if spec.adds_on_host else "P"
            expected |= {(kind, u, last) for u in spec.host_sums for kind in kinds}
        expected |= {("G", u, first) for u in spec.host_sums if spec.continues(u, first)}
    given = {u for u in spec.trainable if u <= spec.head}
    expected |= {("T", u, m) for u in given for m in micro_batches if spec.totals(u, m)}
    expected |= {("V", 0, m) for m in micro_batches if spec.totals_rows(m)}
    expected |= {("D", u, -1) for u in spec.trainable}
    expected |= {("W", u, -1) for u in spec.saved}
    return expected | {("N", -1, -1)} | {("A" if u in spec.resident else "O", u, -1) for u in spec.trainable}


def _check_waste(ops: Sequence[Op], waits: Sequence[tuple[int, ...]]) -> list[str]:
    """Check for uploads that nothing reads, and waits implied by others."""
    errors = []
    unread: dict[Buffer, Op] = {}
    for op in ops:
        for buffer in op.reads:
            unread.pop(buffer, None)
        for buffer in op.writes:
            if buffer in unread and buffer not in op.reads:
                errors.append(
                    f"{unread[buffer]} fills {buffer} and nothing reads it before {op} overwrites it"
                )
            if op.kind in "UQJRG":
                unread[buffer] = op
    errors += [f"{op} fills {buffer} and nothing reads it" for buffer, op in unread.items()]
    minimal = derive_waits(ops)
    for i, given in enumerate(waits):
        errors += [
            f"{ops[i]} waits for {ops[j]}, which other waits imply" for j in given if j not in minimal[i]
        ]
    return errors


def _check_room(ops: Sequence[Op], spec: StepSpec) -> list[str]:
    """Check that slots are within those allocated, and that ops use the slots they declare."""
    errors = []
    shared = spec.is_shared
    grad_slots = spec.grad_slots + 1 + len(spec.own_grad_slots)
    grad_shards = spec.grad_slots + 1 + len(spec.own_grad_shards)
    for op in ops:
        for region, own, count in (
            ("slot", (op.slot, op.table), spec.slots + 1),
            ("staging", (op.staging,), spec.slots + 1 if spec.packed else 0),
            ("shard", (op.shard,), spec.slots + 1 if shared else 0),
            ("grad_slot", (op.grad_slot, op.table_grad), grad_slots),
            ("grad_shard", (op.grad_shard,), grad_shards if shared else 0),
            ("sum_slab", (op.sum_slab,), SUM_SLABS if spec.adds_on_host else 0),
            ("slab", (op.slab,), spec.grad_slabs + 1 if spec.update == "eager" else 0),
            ("boundary_slot", (op.boundary_slot,), spec.boundary_slots),
        ):
            declared = sorted(b.index for b in op.reads | op.writes if b.region == region)
            errors += [
                f"{op} uses {region}.{k}, but only {count} are allocated" for k in declared if k >= count
            ]
            named = sorted(k for k in own if k >= 0)
            if declared != named:
                errors.append(f"{op} works on {region} {named}, but declares {declared}")
            errors += [
                f"{op} uses {region}.{k}, which is too small or too large for it"
                for k in declared
                if not _suits(region, k, _owner(op, Buffer(region, k), spec), spec)
            ]
    return errors


def _suits(region: str, number: int, unit: int, spec: StepSpec) -> bool:
    """Whether a slot is one of those for the unit: the outer one for head and table, its own if it has one,
    else one of the ring."""
    if region not in ("slot", "staging", "shard", "grad_slot", "grad_shard"):
        return True
    outer = spec.outer_grad_slot if region.startswith("grad") else spec.outer_slot
    if unit >= spec.head:
        return number == outer
    own = {"grad_slot": spec.own_grad_slots, "grad_shard": spec.own_grad_shards}.get(region, ())
    return number == outer + 1 + own.index(unit) if unit in own else number < outer
