"""The checker: a negative control for each class of fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from horizon_lm.schedule import Buffer, Op, StepSpec, build_steps, check, derive_waits
from schedule_authorities import Waits, label, plain
from symbolic_steps import STEPS, run_symbolically


def mutants(plan: StepSpec) -> Iterator[tuple[str, list[Op]]]:
    """Schedules with one fault each; not all of them change the result."""
    ops = build_steps(plan, STEPS)
    for i, op in enumerate(ops):
        yield f"without {op}", [*ops[:i], *ops[i + 1 :]]
        yield f"{op} twice", [*ops[: i + 1], *ops[i:]]
        for distance in (1, 2, 5, 9):
            j = i + distance
            if j < len(ops):
                yield f"{op} and {ops[j]} swapped", [*ops[:i], ops[j], *ops[i + 1 : j], op, *ops[j + 1 :]]
                yield f"{op} after {ops[j]}", [*ops[:i], *ops[i + 1 : j + 1], op, *ops[j + 1 :]]
        if op.slot >= 0:
            yield (
                f"{op} with another slot",
                [*ops[:i], with_slot(op, (op.slot + 1) % (plan.slots + 1)), *ops[i + 1 :]],
            )
            yield (
                f"{op} with a slot it does not name",
                [*ops[:i], replace(op, slot=op.slot ^ 1), *ops[i + 1 :]],
            )
        if op.grad_slot >= 0:
            yield (
                f"{op} with another gradient slot",
                [*ops[:i], with_grad_slot(op, abs(1 - op.grad_slot)), *ops[i + 1 :]],
            )
            yield f"{op} without a gradient slot", [*ops[:i], with_grad_slot(op, -1), *ops[i + 1 :]]
        for name, region in (("table", "slot"), ("table_grad", "grad_slot")):
            if getattr(op, name) >= 0:
                for other in (0, -1):
                    moved = _with(op, region, other, name)
                    yield f"{op} with {name}={other}", [*ops[:i], moved, *ops[i + 1 :]]
        for region in ("shard", "grad_shard", "staging"):
            if getattr(op, region) >= 0:
                for other in ((getattr(op, region) + 1) % (plan.grad_slots + 1), -1):
                    yield f"{op} with {region}={other}", [*ops[:i], _with(op, region, other), *ops[i + 1 :]]
        if op.sum_slab >= 0:
            moved = _with(op, "sum_slab", 1 - op.sum_slab)
            yield f"{op} with another slab of sums", [*ops[:i], moved, *ops[i + 1 :]]
        if op.kind == "S":
            yield (
                f"{op} with first={not op.first}",
                [*ops[:i], replace(op, first=not op.first), *ops[i + 1 :]],
            )
        if op.boundary_slot >= 0:
            moved = _with(op, "boundary_slot", 1 - op.boundary_slot)
            yield f"{op} with another boundary slot", [*ops[:i], moved, *ops[i + 1 :]]
        if op.slab >= 0:
            moved = _with(op, "slab", (op.slab + 1) % 3)
            yield f"{op} with another slab", [*ops[:i], moved, *ops[i + 1 :]]
        if op.kind == "F" and op.unit:
            other = replace(op, policy="" if op.policy else "keep")
            yield f"{op} with another policy", [*ops[:i], other, *ops[i + 1 :]]
        if op.kind in "LBTV":
            yield (
                f"{op} with first={not op.first}",
                [*ops[:i], replace(op, first=not op.first), *ops[i + 1 :]],
            )


def with_slot(op: Op, slot: int) -> Op:
    return _with(op, "slot", slot)


def with_grad_slot(op: Op, slot: int) -> Op:
    return _with(op, "grad_slot", slot)


def _with(op: Op, region: str, slot: int, name: str | None = None) -> Op:
    """name: the field of the op; by default that of the region."""
    name = name or region
    own = getattr(op, name)

    def moved(buffers: frozenset[Buffer]) -> frozenset[Buffer]:
        renamed = {b._replace(index=slot) if (b.region, b.index) == (region, own) else b for b in buffers}
        return frozenset(b for b in renamed if b.region != region or b.index >= 0)

    return replace(op, reads=moved(op.reads), writes=moved(op.writes), **{name: slot})


@pytest.mark.parametrize(
    "plan",
    [
        plain(),
        plain(slots=3, grad_slots=1, embedding_unit=4, trainable=frozenset(range(5))),
        plain(slots=4, micro_batches=3, uploaded=frozenset(range(1, 6)), trainable=frozenset(range(1, 6))),
        plain(trainable=frozenset({2, 4}), slots=3),
        plain(embedding_unit=4, trainable=frozenset(range(1, 5)), embedding_frozen=True),
        plain(update="deferred", kept=frozenset({3}), spilled=frozenset({1, 2})),
        plain(update="eager", checkpoint_interval=2, spilled=frozenset({1}), grad_slabs=2),
        plain(
            layers=2,
            embedding_unit=3,
            trainable=frozenset(range(4)),
            uploaded=frozenset({0, 2}),
            resident=frozenset({1, 3}),
            update="deferred",
            rounds=2,
            sums="host",
        ),
        plain(
            layers=2,
            embedding_unit=4,
            trainable=frozenset(range(5)),
            uploaded=frozenset({0, 1, 2, 4}),
            resident=frozenset({3}),
            update="eager",
            micro_batches=3,
            rounds=3,
            sums="add",
        ),
        plain(
            layers=2,
            embedding_unit=3,
            trainable=frozenset(range(4)),
            uploaded=frozenset(range(4)),
            micro_batches=3,
            rounds=2,
            sums="device",
            products=frozenset({1}),
        ),
        plain(
            layers=2,
            embedding_unit=4,
            trainable=frozenset({1, 2}),
            uploaded=frozenset(range(5)),
            resident=frozenset({1, 2}),
            packed=frozenset({2}),
            update="deferred",
        ),
        plain(
            layers=2,
            embedding_unit=3,
            embedding_frozen=True,
            trainable=frozenset(range(4)),
            uploaded=frozenset(range(4)),
            resident=frozenset({2, 3}),
            packed=frozenset({1, 2}),
            update="eager",
        ),
        plain(world=2, reduction="exact"),
        plain(
            layers=2,
            embedding_unit=3,
            trainable=frozenset(range(4)),
            uploaded=frozenset({0, 2}),
            resident=frozenset({1, 3}),
            update="eager",
            micro_batches=3,
            rounds=2,
            sums="host",
            world=2,
            reduction="exact",
        ),
        plain(
            layers=2,
            embedding_unit=4,
            trainable=frozenset(range(1, 5)),
            uploaded=frozenset({0, 1, 2, 4}),
            resident=frozenset({3}),
            update="deferred",
            micro_batches=4,
            rounds=2,
            sums="device",
            world=4,
            reduction="fast",
        ),
    ],
    ids=label,
)
def test_every_mutant_that_changes_the_result_is_found(plan: StepSpec) -> None:
    changed = 0
    for what, ops in mutants(plan):
        if not run_symbolically(plan, ops)[0]:
            changed += 1
            assert check(ops, plan), what
    print(f"\n{changed} mutants of {label(plan)} give another result, all are objected to")
    assert changed > 300


def faults_of(ops: Sequence[Op], plan: StepSpec | None = None, waits: Waits | None = None) -> str:
    return "\n".join(check(ops, plan or plain(), waits))


def place(ops: Sequence[Op], text: str, step: int = 0) -> int:
    return next(i for i, op in enumerate(ops) if (str(op), op.step) == (text, step))


@pytest.fixture
def ops() -> list[Op]:
    return build_steps(plain(), STEPS)


def test_fault_wrong_slot_content(ops: list[Op]) -> None:
    i = place(ops, "F2.0")
    ops[i] = with_slot(ops[i], 1 - ops[i].slot)
    assert "F2.0 of step 0 needs unit 2 in slot" in faults_of(ops)


def test_fault_slot_of_the_step_before(ops: list[Op]) -> None:
    del ops[place(ops, "U0", step=1)]
    assert "F0.0 of step 1 needs unit 0 in slot" in faults_of(ops)


def test_fault_undeclared_slot(ops: list[Op]) -> None:
    i = place(ops, "F2.0")
    ops[i] = replace(ops[i], slot=1 - ops[i].slot)
    assert "F2.0 works on slot" in faults_of(ops)


def test_fault_no_slot(ops: list[Op]) -> None:
    i = place(ops, "F2.0")
    ops[i] = with_slot(ops[i], -1)
    assert "F2.0 of step 0 has no slot to read its weights from" in faults_of(ops)


def test_fault_read_before_written(ops: list[Op]) -> None:
    i = place(ops, "F1.0", step=1)
    ops.insert(place(ops, "F0.0", step=1), ops.pop(i))
    assert "F1.0 of step 1 reads input.1.0, which this step has not written" in faults_of(ops)


def test_fault_weights_from_before_the_update(ops: list[Op]) -> None:
    late = ops.pop(place(ops, "O3"))
    ops.insert(place(ops, "U3", step=1) + 1, late)
    assert "U3 of step 1 reads weights.3 of after step -1 instead of 0" in faults_of(ops)


def test_fault_gradient_of_another_layer(ops: list[Op]) -> None:
    plan = plain(slots=4, micro_batches=1)
    ops = build_steps(plan, STEPS)
    i, j = place(ops, "B3.0"), place(ops, "B2.0")
    ops[i], ops[j] = ops[j], ops[i]
    assert "B2.0 of step 0 reads input_grad.m0, which comes from unit 4 instead of 3" in faults_of(ops, plan)


def test_fault_gradient_taken_too_early(ops: list[Op]) -> None:
    i = place(ops, "D2")
    ops.insert(place(ops, "B2.1"), ops.pop(i))
    assert "D2 of step 0 takes grad_slot" in faults_of(ops)


def test_fault_gradient_overwritten_instead_of_added_to(ops: list[Op]) -> None:
    i = place(ops, "B2.1")
    ops[i] = replace(ops[i], first=True)
    assert "with micro-batches [1] in it" in faults_of(ops)


def test_fault_first_that_is_not_what_is_declared(ops: list[Op]) -> None:
    i = place(ops, "B2.0")
    ops[i] = replace(ops[i], first=False)
    assert "B2.0 of step 0 has first=False, but declares otherwise" in faults_of(ops)


def test_fault_gradient_added_to_what_another_unit_left(ops: list[Op]) -> None:
    i = place(ops, "B2.0")
    ops[i] = replace(ops[i], first=False, reads=ops[i].reads | {Buffer("grad_slot", ops[i].grad_slot)})
    assert "B2.0 of step 0 needs the gradient of unit 2 in grad_slot" in faults_of(ops)


@pytest.mark.parametrize("text", ["F0.0", "F3.1", "L4.0", "B0.1", "D4", "D5", "N", "O5"])
def test_fault_missing_and_doubled_op(ops: list[Op], text: str) -> None:
    i = place(ops, text, step=1)
    assert f"step 1 runs {text} 0 times instead of once" in faults_of([*ops[:i], *ops[i + 1 :]])
    assert f"step 1 runs {text} 2 times instead of once" in faults_of([*ops[: i + 1], *ops[i:]])


def test_fault_op_that_does_not_belong(ops: list[Op]) -> None:
    plan = plain(trainable=frozenset({0, 1, 2, 4, 5}))
    assert "step 0 runs O3 1 times instead of never" in faults_of(ops, plan)


def test_fault_needless_upload(ops: list[Op]) -> None:
    i = place(ops, "U3")
    assert "and nothing reads it before U3 overwrites it" in faults_of([*ops[: i + 1], *ops[i:]])
    last = max(j for j, op in enumerate(ops) if op.kind in "FLB" and op.slot == 0)
    extra = replace(with_slot(ops[i], 0), step=1)
    assert "U3 fills slot.0 and nothing reads it" in faults_of([*ops[: last + 1], extra, *ops[last + 1 :]])


def test_fault_redundant_wait(ops: list[Op]) -> None:
    waits = derive_waits(ops)
    i = place(ops, "F2.0")
    waits[i] = (*waits[i], place(ops, "U1"))
    assert "F2.0 waits for U1, which other waits imply" in faults_of(ops, waits=waits)


def test_fault_wait_on_a_later_op(ops: list[Op]) -> None:
    waits = derive_waits(ops)
    i, j = place(ops, "F2.0"), place(ops, "U0", step=1)
    waits[i] = (*waits[i], j)
    assert "F2.0 waits for U0, which comes later" in faults_of(ops, waits=waits)
    waits[i] = (i,)
    assert "F2.0 waits for F2.0, which comes later" in faults_of(ops, waits=waits)


def test_fault_too_many_slots(ops: list[Op]) -> None:
    plan = plain(slots=3)
    assert "uses slot.3, but only 3 are allocated" in faults_of(build_steps(plan, STEPS), plain())
    assert "uses grad_slot.2, but only 2 are allocated" in faults_of(ops, plain(grad_slots=1))


def test_fault_slot_of_the_wrong_size(ops: list[Op]) -> None:
    """The outer slot is as large as head or table, those of the ring as layers."""
    for text, other in (("U1", 2), ("U4", 0), ("U5", 1)):
        i = place(ops, text)
        moved = with_slot(ops[i], other)
        fault = f"{text} uses slot.{other}, which is too small or too large for it"
        assert fault in faults_of([*ops[:i], moved, *ops[i + 1 :]])


def test_fault_outer_slot_used_again_too_early() -> None:
    """The head takes the slot of the table while a micro-batch still looks up rows, and the table's gradient
    that of the head before it is downloaded."""
    units = frozenset(range(1, 6))
    plan = plain(slots=4, grad_slots=3, uploaded=units, trainable=units)  # no wait for the ring implies these
    ops = build_steps(plan, 1)
    for late, early, buffer in (("U4", "F0.1", "slot.4"), ("B0.1", "D4", "grad_slot.3")):
        i, j = place(ops, late), place(ops, early)
        waits = derive_waits(ops)
        assert faults_of(ops, plan, waits) == ""
        waits[i] = tuple(k for k in waits[i] if k != j)
        found = f"{late} ({ops[i].lane}, step 0) may run before {early} ({ops[j].lane}, step 0) has ended"
        assert f"{found}; both touch {buffer}" in faults_of(ops, plan, waits)


def test_fault_table_in_no_slot(ops: list[Op]) -> None:
    i = place(ops, "F0.1")
    ops[i] = _with(ops[i], "slot", -1, "table")
    assert "F0.1 of step 0 has no slot to read the embedding table from" in faults_of(ops)


def test_fault_rows_left_out_of_the_sum() -> None:
    """The second micro-batch overwrites the sum of the first instead of adding to it."""
    plan = plain(micro_batches=3)
    ops = build_steps(plan, 1)
    i = place(ops, "B0.1")
    ops[i] = replace(ops[i], reads=ops[i].reads - {Buffer("row_grads")})
    assert "D5 of step 0 takes grad_slot.2 with micro-batches [1, 2] in it" in faults_of(ops, plan)


def test_fault_tied_table_without_the_gradient_of_its_head() -> None:
    plan = plain(embedding_unit=4, trainable=frozenset(range(5)))
    ops = build_steps(plan, 1)
    i = place(ops, "B0.1")
    ops[i] = replace(ops[i], reads=ops[i].reads - {Buffer("grad_slot", plan.outer_grad_slot)})
    assert "D4 of step 0 takes grad_slot.2 with micro-batches [0, 1] in it" in faults_of(ops, plan)


def test_fault_swapped_ops(ops: list[Op]) -> None:
    i, j = place(ops, "N"), place(ops, "D5")
    ops[i], ops[j] = ops[j], ops[i]
    assert "N of step 0 reads sqnorm.5, which this step has not written" in faults_of(ops)


# Units in parts.

PARTS = plain(trainable=frozenset({1, 2, 3}), uploaded=frozenset(range(6)), resident=frozenset({1, 2, 3}))
PACKED = replace(PARTS, packed=frozenset({2, 3}))


def changed(ops: list[Op], text: str, **values: object) -> list[Op]:
    i = place(ops, text)
    return [*ops[:i], replace(ops[i], **values), *ops[i + 1 :]]  # type: ignore[arg-type]


def test_fault_split_unit_read_in_one_part_only() -> None:
    ops = build_steps(PARTS, STEPS)
    reads = ops[place(ops, "B2.0")].reads
    assert faults_of(ops, PARTS) == ""
    fault = "B2.0 of step 0 does not read weights.2, where the unit lives"
    assert fault in faults_of(changed(ops, "B2.0", reads=reads - {Buffer("weights", 2)}), PARTS)
    i = place(ops, "B2.0")
    fault = "B2.0 of step 0 has no slot to read its weights from"
    assert fault in faults_of([*ops[:i], with_slot(ops[i], -1), *ops[i + 1 :]], PARTS)


def test_fault_split_unit_uploaded_whole() -> None:
    ops = build_steps(PARTS, STEPS)
    found = faults_of(changed(ops, "U2", reads=frozenset({Buffer("weights", 2)})), PARTS)
    assert "U2 of step 0 reads weights.2 instead of frozen.2" in found
    found = faults_of(changed(ops, "U2", reads=frozenset({Buffer("frozen", 3)})), PARTS)
    assert "U2 of step 0 reads frozen.3 of another unit" in found


def test_fault_frozen_part_overwritten() -> None:
    ops = build_steps(PARTS, STEPS)
    writes = ops[place(ops, "A2")].writes | {Buffer("frozen", 2)}
    assert "A2 of step 0 writes to frozen weights" in faults_of(changed(ops, "A2", writes=writes), PARTS)


def test_fault_packed_unit_not_unpacked() -> None:
    ops = build_steps(PACKED, STEPS)
    assert faults_of(ops, PACKED) == ""
    found = faults_of([op for op in ops if str(op) != "Q2"], PACKED)
    assert "F2.0 of step 0 needs unit 2 in slot" in found and "U2 fills staging" in found


def test_fault_packed_unit_unpacked_before_it_arrives() -> None:
    ops = build_steps(PACKED, STEPS)
    i = place(ops, "Q3")
    early = [
        *ops[: place(ops, "U3")],
        ops[i],
        *[op for k, op in enumerate(ops) if k >= place(ops, "U3") and k != i],
    ]
    assert "Q3 of step 0 needs unit 3 in staging" in faults_of(early, PACKED)


def test_fault_plain_unit_unpacked() -> None:
    ops = build_steps(PACKED, STEPS)
    fault = "Q2 of step 0 has staging slot 0 for a unit that is not packed"
    assert fault in faults_of(ops, replace(PACKED, packed=frozenset({3})))
    fault = "U1 of step 0 has staging slot -1 for a unit that is packed"
    assert fault in faults_of(ops, replace(PACKED, packed=frozenset({1, 2, 3})))


def test_what_a_spec_says_of_parts() -> None:
    with pytest.raises(ValueError, match="unit 1 is split; hint: a rank's share of a unit has one home"):
        replace(PARTS, reduction="exact")
    with pytest.raises(ValueError, match="unit 2 is packed; hint: a rank's share of a unit has one home"):
        plain(packed=frozenset({2}), world=2, reduction="fast")
    with pytest.raises(
        ValueError, match="unit 2 is packed, but not uploaded; hint: packed parts are streamed"
    ):
        plain(packed=frozenset({2}), resident=frozenset({2}))
