"""Plans, and two authorities that stand beside `check`.

A brute-force closure for the order of ops, and a symbolic executor that runs ops on expressions instead of
tensors and compares the weights after two steps with a plain nested loop.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from horizon_lm.schedule import Buffer, Lane, Op, StepSpec, build_steps, derive_waits

STEPS = 2
Waits = Sequence[tuple[int, ...]]


def all_plans() -> Iterator[StepSpec]:
    grid = product(range(1, 7), (True, False), (True, False), (1, 3), (2, 3, 4), (1, 2))
    for layers, tied, prologue, micro_batches, slots, grad_slots in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = units = frozenset({*range(0 if prologue else 1, head + 1), embedding})
        below_the_middle = frozenset(range(layers // 2 + 2))
        choices = {frozenset(), frozenset({1}), below_the_middle, frozenset({embedding})}
        for frozen in sorted(choices, key=sorted):
            if units - frozen:
                plan = StepSpec(layers, uploaded, units - frozen, embedding, micro_batches, slots, grad_slots)
                yield plan
                if tied and head not in frozen:  # a final norm that is trained, a table that is not
                    yield replace(plan, embedding_frozen=True)


PLANS = list(all_plans())


def policy_plans() -> Iterator[StepSpec]:
    """Update modes, kept and spilled layers, blocks: every combination, on models of five layers and less."""
    grid = product(
        (1, 2, 5), (True, False), (1, 3), (1, 2, 3), ("sync", "deferred", "eager"), (0, 1, 2), (0, 1, 2)
    )
    for layers, tied, micro_batches, block, update, keep, spill in grid:
        head = layers + 1
        embedding = head if tied else head + 1
        uploaded = frozenset({*range(layers % 2, head + 1), embedding})
        yield StepSpec(
            layers,
            uploaded,
            uploaded if spill < 2 else frozenset(range(layers // 2 + 1, head + 1)),
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
def prepared(plan: StepSpec) -> tuple[list[Op], list[tuple[int, ...]]]:
    ops = build_steps(plan, STEPS)
    return ops, derive_waits(ops)


def label(plan: StepSpec) -> str:
    frozen = sorted((plan.uploaded | plan.resident) - plan.trainable)
    return (
        f"layers={plan.layers} prologue={0 in plan.uploaded} tied={plan.embedding_unit == plan.head} "
        f"frozen={frozen}{'+table' * plan.embedding_frozen} micro_batches={plan.micro_batches} "
        f"slots={plan.slots}/{plan.grad_slots} {plan.update} kept={sorted(plan.kept)} "
        f"block={plan.checkpoint_interval} spilled={sorted(plan.spilled)} resident={sorted(plan.resident)} "
        f"rounds={plan.rounds} {plan.sums}"
    )


def plain(**changes: Any) -> StepSpec:
    """Three layers, untied, a prologue with weights, two micro-batches, all trainable."""
    values = {
        "layers": 3,
        "trainable": frozenset(range(6)),
        "embedding_unit": 5,
        "micro_batches": 2,
    } | changes
    units = frozenset({*range(5), values["embedding_unit"]})
    values.setdefault("uploaded", units - values.get("resident", frozenset()))
    return StepSpec(**values)


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


# The authority on values: expressions in place of tensors. Takes slots as the engine does, from the op's
# own fields; the declared reads and writes are not looked at.


@dataclass
class Symbols:
    plan: StepSpec
    memory: dict[tuple, Any] = field(default_factory=dict)
    names: dict[Any, int] = field(default_factory=dict)
    alone: dict[int, Any] = field(default_factory=dict)  # gradients of single micro-batches, by their sum

    def name(self, *expression: Any) -> int:
        """A number for an expression, the same for the same one: expressions stay small."""
        return self.names.setdefault(expression, len(self.names))

    def get(self, *place: Any) -> Any:
        return self.memory.get(
            place, "nothing" if place[0] not in ("weights", "state") else ("initial", place[1])
        )

    def run(self, op: Op) -> None:
        plan, u, m, memory = self.plan, op.unit, op.micro_batch, self.memory
        weights = self.weights(u, op.slot)
        data = ("batch", op.step, m)
        if op.kind == "U":
            memory["slot", op.slot] = self.name("U", u, self.get("weights", u))
        elif op.kind in "FC":
            given = self.given(op)
            if u == 0:
                table = self.weights(plan.embedding_unit, op.table)
                given = self.name("rows", table, data)
                memory["call", m] = (self.name("call", given, weights), None)
                if m == 0:
                    memory[("rows",)] = table
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
        elif op.kind == "B" and u == 0:
            self.backward_prologue(op, weights, data)
        elif op.kind in "LB":
            given = self.given(op)
            above = data if op.kind == "L" else self.get("input_grad", m)
            gradient = self.name(op.kind, u, weights, given, above, self.get("call", m))
            if op.kind == "B" and self.get("graph", u, m) != self.name("graph", u, given):
                gradient = self.name("a graph of another input", self.get("graph", u, m))
            if op.kind == "L":
                memory["loss", op.step, m] = gradient
            memory["input_grad", m] = gradient
            self.add(op, gradient)
        elif op.kind in "PSG":
            self.between_rounds(op)
        elif op.kind == "D":
            memory["sqnorm", u] = self.name("D", u, self.get("grad_slot", op.grad_slot))
            memory[self.home(op, u)] = memory["sqnorm", u]
        elif op.kind == "N":
            memory[("clip",)] = self.name("N", *(self.get("sqnorm", k) for k in sorted(plan.trainable)))
        elif op.kind == "W":
            memory["written", op.step, u] = self.get("weights", u), self.get("state", u)
        elif op.kind in "OA":
            gradient = self.get(*self.home(op, u))
            wanted = (self.get("weights", u), self.get("state", u), gradient, self.scale(op))
            memory["weights", u], memory["state", u] = self.name("O", u, *wanted), self.name("M", u, *wanted)

    def weights(self, unit: int, slot: int) -> Any:
        """What is in a slot; a resident unit's where it lives."""
        if unit in self.plan.resident:
            return self.name("U", unit, self.get("weights", unit))
        return self.get("slot", slot) if slot >= 0 else None

    def between_rounds(self, op: Op) -> None:
        memory, u = self.memory, op.unit
        if op.kind == "P":
            target = ("sum_slab", op.sum_slab) if op.sum_slab >= 0 else ("sum", u)
            memory[target] = self.get("grad_slot", op.grad_slot)
        elif op.kind == "G":
            memory["grad_slot", op.grad_slot] = self.get("sum", u)
        else:
            parked = self.get("sum_slab", op.sum_slab)
            gradient = self.alone.get(parked, ("a sum already", parked))
            held = () if op.first else (self.get("sum", u),)
            memory["sum", u] = self.name("sum", held, gradient)

    def add(self, op: Op, gradient: Any) -> None:
        if op.grad_slot >= 0:
            held = () if op.first else (self.get("grad_slot", op.grad_slot),)
            total = self.memory["grad_slot", op.grad_slot] = self.name("sum", held, gradient)
            if op.first:
                self.alone[total] = gradient

    def backward_prologue(self, op: Op, weights: Any, data: Any) -> None:
        m, memory = op.micro_batch, self.memory
        given = self.name("rows", self.get("rows"), data)
        call = self.get("call", m)
        arguments = call[0] if isinstance(call, tuple) else call
        gradient = self.name("B", 0, weights, given, self.get("input_grad", m), arguments)
        self.add(op, gradient)
        if self.plan.sums_rows:
            memory[("row_grads",)] = (*(self.get("row_grads") if m else ()), gradient)
        if op.table_grad >= 0:
            held = self.get("grad_slot", op.table_grad) if self.plan.tied else None
            memory["grad_slot", op.table_grad] = self.name("table", held, self.get("row_grads"))

    def given(self, op: Op) -> Any:
        """A layer's input, where the op's own fields say that it is."""
        if op.boundary_slot >= 0:
            return self.get("boundary_slot", op.boundary_slot)
        return self.get("input", op.unit, op.micro_batch)

    def home(self, op: Op, unit: int) -> tuple[str, int]:
        """Where a complete gradient waits for its update."""
        if self.plan.update == "eager" and unit in self.plan.resident:
            return "grad_slot", op.grad_slot
        return ("slab", op.slab) if op.slab >= 0 else ("grads", unit)

    def scale(self, op: Op) -> Any:
        """What decides on an update beside its gradient: the global norm, or for eager ones the loss and
        the norm of their own."""
        plan = self.plan
        if plan.update != "eager":
            return self.get("clip")
        losses = (self.get("loss", op.step, m) for m in range(plan.micro_batches))
        return self.name("look", self.get("sqnorm", op.unit), *losses)

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
        written = [("written", s, u) for s in range(steps) for u in self.plan.saved]
        losses |= {place: self.get(*place) for place in written}
        return losses | {(region, u): self.get(region, u) for region in ("weights", "state") for u in units}


def reference(plan: StepSpec, symbols: Symbols) -> dict[tuple, Any]:
    """Two steps as one would write them with every unit in its own memory: no slots, no lanes."""
    name, micro_batches, head = symbols.name, range(plan.micro_batches), plan.head
    weights: dict[int, Any] = {u: ("initial", u) for u in range(head + 2)}
    state = dict(weights)
    outcome: dict[tuple, Any] = {}
    for step in range(STEPS):
        data = {m: ("batch", step, m) for m in micro_batches}
        outcome |= {("written", step, u): (weights[u], state[u]) for u in plan.saved}
        used = plan.uploaded | plan.resident
        on_device = {u: name("U", u, weights[u]) if u in used else None for u in range(head + 2)}
        gradients: dict[int, list[int]] = {u: [] for u in range(head + 1)}
        for m in micro_batches:
            inputs = [name("rows", on_device[plan.embedding_unit], data[m])]
            arguments, routers = name("call", inputs[0], on_device[0]), None
            for u in range(head):
                inputs.append(name("F", u, on_device[u], inputs[u], arguments))
                routers = name("routers", routers, inputs[u], on_device[u]) if u else None
            call = (arguments, routers)
            above = outcome["loss", step, m] = name("L", head, on_device[head], inputs[head], data[m], call)
            gradients[head].append(above)
            for u in range(head - 1, -1, -1):
                above = name("B", u, on_device[u], inputs[u], above, call if u else arguments)
                gradients[u].append(above)
        sums: dict[int, Any] = {}
        for u in plan.trainable - {head + 1}:
            total: tuple = ()
            for gradient in gradients[u]:
                total = (name("sum", total, gradient),)
            sums[u] = total[0]
        table = plan.embedding_unit
        if table in plan.trainable and not plan.embedding_frozen:
            sums[table] = name("table", sums.get(table), tuple(gradients[0]))
        grads = {u: name("D", u, total) for u, total in sums.items()}
        clip = name("N", *(grads[k] for k in sorted(plan.trainable)))
        for u in plan.trainable:
            scale = clip
            if plan.update == "eager":
                scale = name("look", grads[u], *(outcome["loss", step, m] for m in micro_batches))
            wanted = (weights[u], state[u], grads[u], scale)
            weights[u], state[u] = name("O", u, *wanted), name("M", u, *wanted)
    outcome |= {("weights", u): weights[u] for u in weights} | {("state", u): state[u] for u in state}
    return outcome


def run_symbolically(
    plan: StepSpec, ops: Sequence[Op], order: Sequence[int] | None = None, ends: Sequence | None = None
) -> tuple[bool, list[int]]:
    """Whether the ops give what the reference gives, and the order in which they ran."""
    symbols = Symbols(plan)
    order = range(len(ops)) if order is None else order
    for i in order:
        symbols.run(ops[i])
        for buffer in ends[i] if ends is not None else ():
            symbols.release(buffer)
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
