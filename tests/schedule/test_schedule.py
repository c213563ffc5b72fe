"""The schedule is sound, computes the right thing, and its checker finds every fault.

Two authorities stand beside `check`: a brute-force closure for the order of ops, and a symbolic executor
that runs ops on expressions instead of tensors and compares the weights after two steps with a plain
nested loop.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_lm.schedule import (
    Buffer,
    Lane,
    Op,
    StepPlan,
    build,
    build_flush,
    build_steps,
    check,
    derive_waits,
    last_uses,
    parse_op,
)
from horizon_lm.schedule.check import ends_before
from horizon_lm.schedule.ops import LANE_OF_KIND
from sizes import times

STEPS = 2
Waits = Sequence[tuple[int, ...]]


def all_plans() -> Iterator[StepPlan]:
    grid = product(range(1, 7), (True, False), (True, False), (1, 3), (2, 3, 4), (1, 2))
    for layers, tied, prologue, micro_batches, slots, grad_slots in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = frozenset(range(0 if prologue else 1, head + 1))
        units = uploaded | {embedding}
        below_the_middle = frozenset(range(layers // 2 + 2))
        choices = {frozenset(), frozenset({1}), below_the_middle, frozenset({embedding})}
        for frozen in sorted(choices, key=sorted):
            if units - frozen:
                plan = StepPlan(layers, uploaded, units - frozen, embedding, micro_batches, slots, grad_slots)
                yield plan
                if tied and head not in frozen:  # a final norm that is trained, a table that is not
                    yield replace(plan, embedding_frozen=True)


PLANS = list(all_plans())


def policy_plans() -> Iterator[StepPlan]:
    """Update modes, kept and spilled layers, blocks: every combination, on models of five layers and less."""
    grid = product(
        (1, 2, 5), (True, False), (1, 3), (1, 2, 3), ("sync", "deferred", "eager"), (0, 1, 2), (0, 1, 2)
    )
    for layers, tied, micro_batches, block, update, keep, spill in grid:
        head = layers + 1
        uploaded = frozenset(range(layers % 2, head + 1))
        embedding = head if tied else head + 1
        yield StepPlan(
            layers,
            uploaded,
            uploaded | {embedding} if spill < 2 else frozenset(range(layers // 2 + 1, head + 1)),
            embedding,
            micro_batches,
            slots=max(2, block) + spill % 2,
            grad_slots=max(1 + tied, block),
            update=update,
            grad_slabs=1 + tied,
            kept=frozenset(range(layers + 1 - keep, head)) if layers > keep else frozenset(),
            checkpoint_interval=block,
            spilled=frozenset(range(1, layers + 1 - spill)) if spill else frozenset(),
            boundary_slots=1 + micro_batches % 2 + tied,
        )


POLICIES = list(policy_plans())
EVERY = PLANS + POLICIES


@cache
def prepared(plan: StepPlan) -> tuple[list[Op], list[tuple[int, ...]]]:
    ops = build_steps(plan, STEPS)
    return ops, derive_waits(ops)


def label(plan: StepPlan) -> str:
    frozen = sorted((plan.uploaded | {plan.embedding_unit}) - plan.trainable)
    return (
        f"layers={plan.layers} prologue={0 in plan.uploaded} tied={plan.embedding_unit == plan.head} "
        f"frozen={frozen}{'+table' * plan.embedding_frozen} micro_batches={plan.micro_batches} "
        f"slots={plan.slots}/{plan.grad_slots} {plan.update} kept={sorted(plan.kept)} "
        f"block={plan.checkpoint_interval} spilled={sorted(plan.spilled)}"
    )


def plain(**changes: Any) -> StepPlan:
    """Three layers, untied, a prologue with weights, two micro-batches, all trainable."""
    values = {
        "layers": 3,
        "uploaded": frozenset(range(5)),
        "trainable": frozenset(range(6)),
        "embedding_unit": 5,
    }
    return StepPlan(**(values | {"micro_batches": 2} | changes))


# The authority on order: closure of lane order and waits, every pair of conflicting ops.


def closure(ops: Sequence[Op], waits: Waits) -> list[set[int]]:
    """For each op all that end before it starts, by depth-first search over its predecessors."""
    before: list[set[int]] = []
    for i, op in enumerate(ops):
        stack = [j for j in range(i) if ops[j].lane == op.lane] + list(waits[i])
        seen: set[int] = set()
        while stack:
            j = stack.pop()
            if j not in seen:
                seen.add(j)
                stack += [k for k in range(j) if ops[k].lane == ops[j].lane] + list(waits[j])
        before.append(seen)
    return before


def unordered_conflicts(ops: Sequence[Op], waits: Waits) -> int:
    """Pairs of ops and buffers that one of the two writes and the other touches, in no order."""
    before = closure(ops, waits)
    return sum(
        len((a.writes & (b.reads | b.writes)) | (b.writes & (a.reads | a.writes)))
        for i, b in enumerate(ops)
        for j, a in enumerate(ops[:i])
        if j not in before[i]
    )


def order_faults(faults: list[str]) -> list[str]:
    return [fault for fault in faults if "may run before" in fault]


# The authority on values: expressions in place of tensors. Takes slots as the engine does, from the op's
# own fields; the declared reads and writes are not looked at.


@dataclass
class Symbols:
    plan: StepPlan
    memory: dict[tuple, Any] = field(default_factory=dict)
    names: dict[Any, int] = field(default_factory=dict)

    def name(self, *expression: Any) -> int:
        """A number for an expression, the same for the same one: expressions stay small."""
        return self.names.setdefault(expression, len(self.names))

    def get(self, *place: Any) -> Any:
        return self.memory.get(
            place, "nothing" if place[0] not in ("weights", "state") else ("initial", place[1])
        )

    def run(self, op: Op) -> None:
        plan, u, m, memory = self.plan, op.unit, op.micro_batch, self.memory
        weights = self.get("slot", op.slot) if op.slot >= 0 else None
        data = ("batch", op.step, m)
        if op.kind == "G":
            memory["embeds", m] = self.name("G", self.get("weights", plan.embedding_unit), data)
        elif op.kind == "U":
            memory["slot", op.slot] = self.name("U", u, self.get("weights", u))
        elif op.kind in "FC":
            given = self.given(op)
            if u == 0:
                memory["call", m] = (self.name("call", given, weights), None)
            call = self.get("call", m)
            arguments, routers = call if isinstance(call, tuple) else (call, None)  # not there, or released
            memory["input", u + 1, m] = self.name("F", u, weights, given, arguments)
            if op.policy:
                memory["graph", u, m] = self.name("graph", u, given)
            if op.kind == "F" and u:
                memory["call", m] = (arguments, self.name("routers", routers, given, weights))
        elif op.kind == "X":
            memory["boundary", u, m] = self.get("input", u, m)
        elif op.kind == "R":
            memory["boundary_slot", op.boundary_slot] = self.get("boundary", u, m)
        elif op.kind in "LB":
            given = self.given(op)
            above = data if op.kind == "L" else self.get("input_grad", m)
            gradient = self.name(op.kind, u, weights, given, above, self.get("call", m) if u else None)
            if op.kind == "B" and u and self.get("graph", u, m) != self.name("graph", u, given):
                gradient = self.name("a graph of another input", self.get("graph", u, m))
            if op.kind == "L":
                memory["loss", op.step, m] = gradient
            memory[("embeds_grad", m) if u == 0 else ("input_grad", m)] = gradient
            if op.grad_slot >= 0:
                held = () if op.first else (self.get("grad_slot", op.grad_slot),)
                memory["grad_slot", op.grad_slot] = self.name("sum", held, gradient)
        elif op.kind == "D":
            memory["sqnorm", u] = self.name("D", u, self.get("grad_slot", op.grad_slot))
            memory[self.home(op, u)] = memory["sqnorm", u]
        elif op.kind == "S":
            rows = tuple(self.get("embeds_grad", k) for k in range(plan.micro_batches))
            tied = plan.embedding_unit == plan.head
            held = self.get(*self.home(op, plan.head)) if tied else None
            memory["sqnorm", "rows"] = self.name("S", held, rows)
            memory[self.home(op, plan.embedding_unit)] = memory["sqnorm", "rows"]
        elif op.kind == "N":
            memory[("clip",)] = self.name(
                "N", *(self.get("sqnorm", k) for k in [*sorted(plan.trainable), "rows"])
            )
        elif op.kind == "O":
            gradient = self.get(*self.home(op, u))
            wanted = (self.get("weights", u), self.get("state", u), gradient, self.scale(op))
            memory["weights", u], memory["state", u] = self.name("O", u, *wanted), self.name("M", u, *wanted)

    def given(self, op: Op) -> Any:
        """A unit's input, where the op's own fields say that it is."""
        if op.unit == 0:
            return self.get("embeds", op.micro_batch)
        if op.boundary_slot >= 0:
            return self.get("boundary_slot", op.boundary_slot)
        return self.get("input", op.unit, op.micro_batch)

    def home(self, op: Op, unit: int) -> tuple[str, int]:
        return ("slab", op.slab) if op.slab >= 0 else ("grads", unit)

    def scale(self, op: Op) -> Any:
        """What decides on an update beside its gradient: the global norm, or for eager ones the loss and
        the norm of their own."""
        plan = self.plan
        if plan.update != "eager":
            return self.get("clip")
        rows = self.get("sqnorm", "rows") if plan.scatters and op.unit == plan.embedding_unit else None
        losses = (self.get("loss", op.step, m) for m in range(plan.micro_batches))
        return self.name("look", self.get("sqnorm", op.unit), rows, *losses)

    def release(self, buffer: Buffer) -> None:
        place = tuple(part for part in buffer if part != -1)
        self.memory[place] = "poison"

    def outcome(self, steps: int = STEPS) -> dict[tuple, Any]:
        """The losses, and the weights and optimizer state at the end."""
        losses = {
            ("loss", s, m): self.get("loss", s, m)
            for s in range(steps)
            for m in range(self.plan.micro_batches)
        }
        units = [*range(self.plan.head + 2)]
        return losses | {(region, u): self.get(region, u) for region in ("weights", "state") for u in units}


def reference(plan: StepPlan, symbols: Symbols) -> dict[tuple, Any]:
    """Two steps as one would write them with every unit in its own memory: no slots, no lanes."""
    name, micro_batches, head = symbols.name, range(plan.micro_batches), plan.head
    weights: dict[int, Any] = {u: ("initial", u) for u in range(head + 2)}
    state = dict(weights)
    outcome: dict[tuple, Any] = {}
    for step in range(STEPS):
        data = {m: ("batch", step, m) for m in micro_batches}
        on_device = {u: name("U", u, weights[u]) if u in plan.uploaded else None for u in range(head + 1)}
        gradients: dict[int, list[int]] = {u: [] for u in range(head + 1)}
        embeds_grads = {}
        for m in micro_batches:
            inputs = [name("G", weights[plan.embedding_unit], data[m])]
            arguments, routers = name("call", inputs[0], on_device[0]), None
            for u in range(head):
                inputs.append(name("F", u, on_device[u], inputs[u], arguments))
                routers = name("routers", routers, inputs[u], on_device[u]) if u else None
            call = (arguments, routers)
            above = outcome["loss", step, m] = name("L", head, on_device[head], inputs[head], data[m], call)
            gradients[head].append(above)
            for u in range(head - 1, -1, -1):
                above = name("B", u, on_device[u], inputs[u], above, call if u else None)
                gradients[u].append(above)
            embeds_grads[m] = above
        grads: dict[Any, Any] = {}
        for u in plan.trainable - {head + 1}:
            total: tuple = ()
            for gradient in gradients[u]:
                total = (name("sum", total, gradient),)
            grads[u] = name("D", u, *total)
        norms = dict(grads)
        if plan.embedding_unit in plan.trainable and not plan.embedding_frozen:
            norms["rows"] = name("S", grads.get(plan.embedding_unit), tuple(embeds_grads.values()))
            grads[plan.embedding_unit] = norms["rows"]
        clip = name("N", *(norms.get(k, "nothing") for k in [*sorted(plan.trainable), "rows"]))
        for u in plan.trainable:
            scale = clip
            if plan.update == "eager":
                own = norms.get(u, "nothing")
                rows = norms["rows"] if plan.scatters and u == plan.embedding_unit else None
                scale = name("look", own, rows, *(outcome["loss", step, m] for m in micro_batches))
            wanted = (weights[u], state[u], grads[u], scale)
            weights[u], state[u] = name("O", u, *wanted), name("M", u, *wanted)
    outcome |= {("weights", u): weights[u] for u in weights} | {("state", u): state[u] for u in state}
    return outcome


def run_symbolically(
    plan: StepPlan, ops: Sequence[Op], order: Sequence[int] | None = None, ends: Sequence | None = None
) -> tuple[bool, list[int]]:
    """Whether the ops give what the reference gives, and the order in which they ran."""
    symbols = Symbols(plan)
    order = range(len(ops)) if order is None else order
    for i in order:
        symbols.run(ops[i])
        for buffer in ends[i] if ends is not None else ():
            symbols.release(buffer)
    # An untied table has no squared norm of its own beside that of its rows.
    return symbols.outcome() == reference(plan, symbols), list(order)


def random_order(ops: Sequence[Op], waits: Waits, rng: random.Random) -> list[int]:
    """Any order that lanes and waits allow."""
    queues = {lane: [i for i, op in enumerate(ops) if op.lane == lane] for lane in Lane}
    done: set[int] = set()
    order: list[int] = []
    while len(order) < len(ops):
        ready = [queue for queue in queues.values() if queue and done.issuperset(waits[queue[0]])]
        i = rng.choice(ready).pop(0)
        done.add(i)
        order.append(i)
    return order


# What is built is sound.


def test_two_consecutive_steps_are_sound_over_the_whole_grid() -> None:
    assert len(PLANS) > 1400 and len(POLICIES) > 900
    for plan in EVERY:
        ops, waits = prepared(plan)
        assert check(ops, plan, waits) == [], label(plan)


def test_two_steps_compute_what_a_nested_loop_computes() -> None:
    for plan in EVERY:
        assert run_symbolically(plan, prepared(plan)[0])[0], label(plan)


def test_any_order_that_the_waits_allow_computes_the_same_across_the_seam() -> None:
    """Released buffers are poisoned, so this also shows that nothing is released too early."""
    rng, overlapping = random.Random(0), 0
    for plan in EVERY[::3]:
        ops, waits = prepared(plan)
        ends = last_uses(ops)
        for _ in range(3):
            same, order = run_symbolically(plan, ops, random_order(ops, waits, rng), ends)
            assert same, f"{label(plan)} in the order {' '.join(str(ops[i]) for i in order)}"
            steps = [ops[i].step for i in order]
            overlapping += steps != sorted(steps)
    assert overlapping > 100, "the second step never began before the first had ended"


def test_uploads_of_a_step() -> None:
    """At most twice a unit, once for the units at the turn: at most 4 bytes a parameter in bf16."""
    for plan in PLANS:
        uploads = Counter(op.unit for op in build(plan) if op.kind == "U")
        assert set(uploads) == plan.uploaded, label(plan)
        assert max(uploads.values()) <= 2
        assert uploads[plan.head] == 1
        # What is still in a slot at the turn does not cross the bus again: the last `slots` units.
        once = [u for u in plan.uploaded if u > plan.head - plan.slots]
        assert all(uploads[u] == 1 for u in once), label(plan)
        for unit in plan.uploaded - set(once):
            needed_again = unit >= plan.lowest_backward
            assert uploads[unit] == 1 + needed_again, label(plan)


def test_uploads_do_not_depend_on_micro_batches() -> None:
    for plan in PLANS:
        for kind in "UD":
            one = [str(op) for op in build(replace(plan, micro_batches=1)) if op.kind == kind]
            assert one == [str(op) for op in build(plan) if op.kind == kind]


def test_micro_batches_pass_the_turn_one_after_another() -> None:
    """Where head and last block fit side by side: computed once, and one graph at a time."""
    for plan in PLANS:
        if not plan.blocks:
            continue
        ops = build(plan)
        block = plan.blocks[-1]
        fits = len({*block, plan.head} & plan.uploaded) <= plan.slots
        fits = fits and len({*block, plan.head} & plan.trainable) <= plan.grad_slots
        assert (block[-1] in plan.at_turn) == (fits or plan.micro_batches == 1)
        if not fits:
            continue
        assert not any(op.kind == "C" and op.unit in block for op in ops)
        alive, most = set(), 0
        for op in ops:
            graphs = {b for b in op.reads | op.writes if b.region == "graph" and b.index in block}
            alive = alive | graphs if op.kind == "F" else alive - graphs
            most = max(most, len(alive))
        assert most == len(block)


def test_uploads_run_ahead() -> None:
    """An upload never has to wait for the very visit before the one that needs it: slots - 1 visits ahead."""
    for slots in (2, 3, 4):
        plan = plain(
            layers=6, uploaded=frozenset(range(1, 8)), trainable=frozenset(range(1, 9)), embedding_unit=8
        )
        plan = replace(plan, slots=slots)
        ops = build(plan)
        before = closure(ops, derive_waits(ops))
        for i, op in enumerate(ops):
            if op.kind == "U":
                user = next(
                    k for k in range(i, len(ops)) if op.writes & ops[k].reads and ops[k].kind in "FLB"
                )
                visits = {
                    (ops[k].kind, ops[k].unit)
                    for k in range(user)
                    if ops[k].kind in "FLB" and k not in before[i]
                }
                possible = len({(ops[k].kind, ops[k].unit) for k in range(user) if ops[k].kind in "FLB"})
                assert len(visits) >= min(slots - 1, possible), f"{op} with {slots} slots"


def test_lower_bounds_of_a_plan() -> None:
    for name, value in {"layers": 0, "micro_batches": 0, "slots": 1, "grad_slots": 0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}; hint"):
            plain(**{name: value})
    with pytest.raises(ValueError, match="embedding_unit=2"):
        plain(embedding_unit=2)


def test_a_step_without_trainable_units_is_forward_and_loss_alone() -> None:
    plan = plain(trainable=frozenset())
    assert {op.kind for op in build(plan)} == set("GUFLN")
    assert check(build_steps(plan, 2), plan) == []


def test_uploads_of_blocks() -> None:
    """Layers that are computed again together are uploaded once for that: twice a step, as any other."""
    for plan in POLICIES:
        if plan.slots > plan.checkpoint_interval:
            uploads = Counter(op.unit for op in build(plan) if op.kind == "U")
            assert set(uploads) == plan.uploaded and max(uploads.values()) <= 2, label(plan)


def test_each_layer_is_computed_again_at_most_once() -> None:
    """Forward ops and recomputations of a step: a layer that keeps its activations runs once, any other
    once more, whether in its own backward (which continues a graph) or ahead of it in its block."""
    for plan in POLICIES:
        ops = build(plan)
        runs = Counter((op.unit, op.micro_batch) for op in ops if op.kind in "FC" and 0 < op.unit < plan.head)
        again = {op.unit for op in ops if op.kind == "F" and op.policy == "recompute"}
        for (unit, _), count in runs.items():
            expected = 1 if unit in again or plan.policy(unit) == "keep" or unit < plan.lowest_backward else 2
            assert count == expected, label(plan)


def test_deferred_updates_come_before_their_unit_is_used() -> None:
    plan = plain(update="deferred")
    ops = [str(op) for op in build(plan, 1, plan.trainable)]
    assert ops[:9] == ["O5", "G.0", "G.1", "O0", "U0", "O1", "U1", "F0.0", "F0.1"]
    assert [op for op in ops if op.startswith("O")] == ["O5", "O0", "O1", "O2", "O3", "O4"]
    assert ops[-1] == "N" and not any(op.startswith("O") for op in map(str, build(plan)))
    assert [str(op) for op in build_flush(plan, 1, {2, 5, 3})] == ["O5", "O2", "O3"]


def test_eager_updates_follow_their_gradient() -> None:
    plan = plain(update="eager")
    ops = [str(op) for op in build(plan)]
    for unit in range(5):
        assert ops.index(f"O{unit}") == ops.index(f"D{unit}") + 1
    assert ops[-3:] == ["S", "O5", "N"]
    tied = [str(op) for op in build(plain(update="eager", embedding_unit=4, trainable=frozenset(range(5))))]
    assert tied[-3:] == ["S", "O4", "N"]  # the table's gradient is complete only then


def test_an_evaluation_is_a_forward_pass_and_the_loss() -> None:
    for plan in [*PLANS[::20], *POLICIES[::20]]:
        plan = replace(plan, evaluate=True)
        ops = build(plan)
        assert {op.kind for op in ops} == set("GUFE") - (set() if plan.uploaded else {"U"})
        assert check(ops, plan) == [], label(plan)
        assert not any(op.policy or op.grad_slot >= 0 for op in ops)


# Order: every derived wait is needed, and the checker agrees with brute force.


def test_removing_any_one_wait_is_found() -> None:
    removed = 0
    every = times(29, 13)  # coprime to the number of values of each setting: all of them are among these
    plans = [*PLANS[::every], *POLICIES[::every]]
    for plan in plans:
        ops, waits = prepared(plan)
        for i, targets in enumerate(waits):
            for j in targets:
                fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
                faults = order_faults(check(ops, plan, fewer))
                assert faults, f"{ops[i]} need not wait for {ops[j]}: {label(plan)}"
                assert any(f.startswith(f"{ops[i]} ") and f" {ops[j]} " in f for f in faults)
                removed += 1
    print(f"\n{removed} derived waits removed one by one from {len(plans)} schedules of two steps, all found")
    assert removed > 100_000 // every


def test_removing_a_wait_gives_wrong_values_in_some_order() -> None:
    """The checker does not object for nothing: almost every wait that is missing can change the result."""
    rng, plan = random.Random(1), plain(micro_batches=1, grad_slots=1)
    ops, waits = prepared(plan)
    ends = last_uses(ops)
    harmless = []
    for i, targets in enumerate(waits):
        for j in targets:
            fewer = [*waits[:i], tuple(k for k in targets if k != j), *waits[i + 1 :]]
            orders = (random_order(ops, fewer, rng) for _ in range(200))
            if all(run_symbolically(plan, ops, order, ends)[0] for order in orders):
                harmless.append((i, j))
    assert not harmless, [f"{ops[i]} after {ops[j]}" for i, j in harmless]


SMALL = [plan for plan in PLANS if plan.layers <= 2 and plan.micro_batches == 1 and len(plan.trainable) > 1]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SMALL), st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 6))
def test_order_verdict_equals_brute_force(plan: StepPlan, seed: int, drops: int, adds: int) -> None:
    """Random waits removed and added: as many unordered conflicts as the transitive closure shows."""
    rng = random.Random(seed)
    ops, derived = prepared(plan)
    waits = [set(targets) for targets in derived]
    edges = [(i, j) for i, targets in enumerate(derived) for j in targets]
    for i, j in rng.sample(edges, min(drops, len(edges))):
        waits[i].discard(j)
    for _ in range(adds):
        i = rng.randrange(1, len(ops))
        waits[i].add(rng.randrange(i))
    mutated = [tuple(sorted(targets)) for targets in waits]
    expected = unordered_conflicts(ops, mutated)
    assert len(order_faults(check(ops, plan, mutated))) == expected
    if drops > adds:
        assert expected > 0 or adds > 0


def test_brute_force_sees_both_verdicts() -> None:
    """The comparison above is not vacuous: without waits there are conflicts, with the derived ones none."""
    for plan in SMALL[::10]:
        ops, waits = prepared(plan)
        assert unordered_conflicts(ops, waits) == 0
        assert unordered_conflicts(ops, [()] * len(ops)) > 20


def test_derived_waits_are_the_transitive_reduction() -> None:
    for plan in SMALL[::5]:
        ops, waits = prepared(plan)
        before = closure(ops, waits)
        assert [{j for j in range(len(ops)) if bits >> j & 1} for bits in ends_before(ops, waits)] == before
        for i, targets in enumerate(waits):
            for j in targets:
                others = {k for k in targets if k != j} | {k for k in range(i) if ops[k].lane == ops[i].lane}
                assert not any(j == k or j in before[k] for k in others)
                assert ops[j].lane != ops[i].lane


# Releases.


def test_nothing_is_released_before_its_last_reader() -> None:
    """When the op that releases a buffer has ended, so have all that touched it since it was written."""
    for plan in EVERY:
        ops, waits = prepared(plan)
        ends, known = last_uses(ops), ends_before(ops, waits)
        touched: dict[Buffer, list[int]] = {}
        for i, op in enumerate(ops):
            for buffer in op.writes - op.reads:
                assert not touched.get(buffer) or buffer.region not in TRANSIENT, (
                    f"{buffer} before {op} not released"
                )
            for buffer in op.reads | op.writes:
                touched.setdefault(buffer, []).append(i)
            for buffer in ends[i]:
                assert buffer.region in TRANSIENT
                earlier = [j for j in touched.pop(buffer) if j != i]
                assert all(known[i] >> j & 1 for j in earlier), (
                    f"{op} releases {buffer} too early: {label(plan)}"
                )
                user = next((o for o in ops[i + 1 :] if buffer in o.reads | o.writes), None)
                assert user is None or buffer not in user.reads
        assert not any(buffer.region in TRANSIENT for buffer in touched), "never released"


TRANSIENT = {"slot", "grad_slot", "slab", "embeds", "call", "input", "graph", "boundary", "boundary_slot"}
TRANSIENT |= {"input_grad", "embeds_grad"}


def test_readers_of_a_transient_buffer_are_on_one_lane() -> None:
    """Gradient slots excepted: compute adds to them, download takes them."""
    for plan in PLANS:
        lanes: dict[Buffer, set[Lane]] = {}
        for op in build(plan):
            for buffer in op.reads:
                if buffer.region in TRANSIENT:
                    lanes.setdefault(buffer, set()).add(op.lane)
        assert all(len(found) == 1 for buffer, found in lanes.items() if buffer.region != "grad_slot")


def test_a_release_one_op_too_early_gives_wrong_values() -> None:
    plan = plain()
    ops, _ = prepared(plan)
    ends = [list(buffers) for buffers in last_uses(ops)]
    caught = 0
    for i, op in enumerate(ops):
        for buffer in ends[i]:
            user = max(j for j in range(i) if buffer in ops[j].reads | ops[j].writes)
            early = [list(buffers) for buffers in ends]
            early[i].remove(buffer)
            early[user].append(buffer)
            assert not run_symbolically(plan, ops, None, early)[0], f"{buffer} after {ops[user]} before {op}"
            caught += 1
    assert caught > 40


# The checker: a negative control for each class of fault.


def mutants(plan: StepPlan) -> Iterator[tuple[str, list[Op]]]:
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
                [*ops[:i], with_slot(op, (op.slot + 1) % plan.slots), *ops[i + 1 :]],
            )
            yield (
                f"{op} with a slot it does not name",
                [*ops[:i], replace(op, slot=op.slot ^ 1), *ops[i + 1 :]],
            )
        if op.grad_slot >= 0:
            yield (
                f"{op} with another gradient slot",
                [*ops[:i], with_grad_slot(op, 1 - op.grad_slot), *ops[i + 1 :]],
            )
            yield f"{op} without a gradient slot", [*ops[:i], with_grad_slot(op, -1), *ops[i + 1 :]]
        if op.boundary_slot >= 0:
            moved = _with(op, "boundary_slot", 1 - op.boundary_slot)
            yield f"{op} with another boundary slot", [*ops[:i], moved, *ops[i + 1 :]]
        if op.slab >= 0:
            moved = _with(op, "slab", (op.slab + 1) % 3)
            yield f"{op} with another slab", [*ops[:i], moved, *ops[i + 1 :]]
        if op.kind == "F" and op.unit:
            other = replace(op, policy="" if op.policy else "keep")
            yield f"{op} with another policy", [*ops[:i], other, *ops[i + 1 :]]
        if op.kind in "LB":
            yield (
                f"{op} with first={not op.first}",
                [*ops[:i], replace(op, first=not op.first), *ops[i + 1 :]],
            )


def with_slot(op: Op, slot: int) -> Op:
    return _with(op, "slot", slot)


def with_grad_slot(op: Op, slot: int) -> Op:
    return _with(op, "grad_slot", slot)


def _with(op: Op, region: str, slot: int) -> Op:
    def moved(buffers: frozenset[Buffer]) -> frozenset[Buffer]:
        renamed = {b._replace(index=slot) if b.region == region else b for b in buffers}
        return frozenset(b for b in renamed if b.region != region or slot >= 0)

    return replace(op, reads=moved(op.reads), writes=moved(op.writes), **{region: slot})


@pytest.mark.parametrize(
    "plan",
    [
        plain(),
        plain(slots=3, grad_slots=1, embedding_unit=4, trainable=frozenset(range(5))),
        plain(slots=4, micro_batches=3, uploaded=frozenset(range(1, 5)), trainable=frozenset(range(1, 6))),
        plain(trainable=frozenset({2, 4}), slots=3),
        plain(embedding_unit=4, trainable=frozenset(range(1, 5)), embedding_frozen=True),
        plain(update="deferred", kept=frozenset({3}), spilled=frozenset({1, 2})),
        plain(update="eager", checkpoint_interval=2, spilled=frozenset({1}), grad_slabs=2),
    ],
    ids=label,
)
def test_every_mutant_that_changes_the_result_is_found(plan: StepPlan) -> None:
    changed = found = 0
    for what, ops in mutants(plan):
        wrong = not run_symbolically(plan, ops)[0]
        faults = check(ops, plan)
        changed, found = changed + wrong, found + bool(faults)
        assert faults or not wrong, what
    print(f"\n{changed} mutants of {label(plan)} give another result, {found} are objected to")
    assert changed > 300


def faults_of(ops: Sequence[Op], plan: StepPlan | None = None, waits: Waits | None = None) -> str:
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


@pytest.mark.parametrize("text", ["G.1", "F0.0", "F3.1", "L4.0", "B0.1", "D4", "S", "N", "O5"])
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
    waits[i] = (*waits[i], place(ops, "G.0"))
    assert "F2.0 waits for G.0, which other waits imply" in faults_of(ops, waits=waits)


def test_fault_wait_on_a_later_op(ops: list[Op]) -> None:
    waits = derive_waits(ops)
    i, j = place(ops, "F2.0"), place(ops, "U0", step=1)
    waits[i] = (*waits[i], j)
    assert "F2.0 waits for U0, which comes later" in faults_of(ops, waits=waits)
    waits[i] = (i,)
    assert "F2.0 waits for F2.0, which comes later" in faults_of(ops, waits=waits)


def test_fault_too_many_slots(ops: list[Op]) -> None:
    plan = plain(slots=3)
    assert "uses slot.2, but only 2 are allocated" in faults_of(build_steps(plan, STEPS), plain())
    assert "uses grad_slot.1, but only 1 are allocated" in faults_of(ops, plain(grad_slots=1))


def test_fault_swapped_ops(ops: list[Op]) -> None:
    i, j = place(ops, "N"), place(ops, "S")
    ops[i], ops[j] = ops[j], ops[i]
    assert "N of step 0 reads sqnorm.5, which this step has not written" in faults_of(ops)


# Text.


def test_ops_are_printed_and_parsed() -> None:
    for plan in PLANS[::50]:
        for op in build(plan):
            assert parse_op(str(op)) == (op.kind, op.unit, op.micro_batch)
    assert parse_op("U0") == ("U", 0, -1)
    assert parse_op("G.0") == ("G", -1, 0)
    assert parse_op("B12.34") == ("B", 12, 34)


@given(
    st.sampled_from(sorted(LANE_OF_KIND)),
    st.integers(-1, 10**6),
    st.integers(-1, 10**6),
)
def test_print_and_parse_round_trip(kind: str, unit: int, micro_batch: int) -> None:
    assert parse_op(str(Op(kind, unit, micro_batch))) == (kind, unit, micro_batch)


@pytest.mark.parametrize("text", ["", "3", "Z3", "U-1", "U3.", "U3.1.2", "u3", "U 3", "U3\n", "U٣"])
def test_text_that_is_no_op_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an op"):
        parse_op(text)


def test_buffers_are_printed() -> None:
    assert str(Buffer("weights", 3)) == "weights.3"
    assert str(Buffer("input", 3, 1)) == "input.3.1"
    assert str(Buffer("embeds", -1, 1)) == "embeds.m1"
    assert str(Buffer("clip")) == "clip"


def test_the_schedule_is_pure() -> None:
    """No torch in this folder: planners and simulators run where there is none."""
    import subprocess
    import sys

    code = "import sys, horizon_lm.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
