"""Symbolic steps: ops run on expressions instead of tensors, and the plain nested loop they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from horizon_lm.schedule import Buffer, Op, StepSpec
from horizon_lm.schedule.world import is_collective

STEPS = 2


@dataclass
class Symbols:
    """The memory of a rank, which may stand alone for all of its world.

    Takes slots as the engine does, from the op's own fields; declared reads and writes are not looked at.
    """

    plan: StepSpec
    memory: dict[tuple, Any] = field(default_factory=dict)
    names: dict[Any, int] = field(default_factory=dict)
    alone: dict[int, Any] = field(default_factory=dict)  # gradients of single micro-batches, by their sum
    mark: tuple[int, ...] = ()  # the rank's number, if several are run

    def name(self, *expression: Any) -> int:
        """A number for an expression, the same for the same one: expressions stay small."""
        return self.names.setdefault(expression, len(self.names))

    def get(self, *place: Any) -> Any:
        return self.memory.get(
            place, "nothing" if place[0] not in ("weights", "state") else ("initial", place[1], *self.mark)
        )

    def run(self, op: Op) -> None:
        plan, u, m, memory = self.plan, op.unit, op.micro_batch, self.memory
        weights = self.weights(u, op.slot)
        data = ("batch", op.step, m, *self.mark)
        if op.kind == "U" and plan.is_shared:
            memory["shard", op.shard] = self.get("weights", u)
        elif op.kind == "U":
            frozen = self.name("frozen", u)
            value = frozen if u in plan.split else self.name("U", u, self.get("weights", u))
            if u in plan.packed:
                memory["staging", op.staging] = ("packed", value)
            else:
                memory["slot", op.slot] = value
        elif op.kind == "Q":
            staged = self.get("staging", op.staging)
            memory["slot", op.slot] = staged[1] if isinstance(staged, tuple) else ("not packed", staged)
        elif is_collective(op):
            meet([self], [op])
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
            memory["sqnorm", u] = self.name("D", u, self.get(*self.held(op)))
            memory[self.home(op, u)] = memory["sqnorm", u]
        elif op.kind == "W":
            memory["written", op.step, u] = self.get("weights", u), self.get("state", u)
        elif op.kind in "OA":
            self.update(op, self.get("clip"))

    def update(self, op: Op, scale: Any) -> None:
        """scale: what decides on an update beside its gradient: the global norm, or for eager ones the loss
        and the norm of their own."""
        u, memory = op.unit, self.memory
        wanted = (self.get("weights", u), self.get("state", u), self.get(*self.home(op, u)), scale)
        memory["weights", u], memory["state", u] = self.name("O", u, *wanted), self.name("M", u, *wanted)

    def weights(self, unit: int, slot: int) -> Any:
        """What is in a slot; a resident unit's where it lives, unless that is a share."""
        if unit in self.plan.resident and not self.plan.is_shared:
            home = self.name("U", unit, self.get("weights", unit))
            frozen = self.name("frozen", unit)
            streamed = self.get("slot", slot) if unit in self.plan.split else frozen
            return home if streamed == frozen else self.name("not its frozen part", streamed, home)
        return self.get("slot", slot) if slot >= 0 else None

    def between_rounds(self, op: Op) -> None:
        memory, u = self.memory, op.unit
        if op.kind == "P":
            target = ("sum_slab", op.sum_slab) if op.sum_slab >= 0 else ("sum", u)
            memory[target] = self.get(*self.held(op))
        elif op.kind == "G":
            memory[self.held(op)] = self.get("sum", u)
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
            earlier = m and self.plan.reduction != "exact"
            memory[("row_grads",)] = (*(self.get("row_grads") if earlier else ()), gradient)
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
            return self.held(op)
        return ("slab", op.slab) if op.slab >= 0 else ("grads", unit)

    def held(self, op: Op) -> tuple[str, int]:
        """Where a gradient becomes complete on the device."""
        return ("grad_shard", op.grad_shard) if self.plan.is_shared else ("grad_slot", op.grad_slot)

    def losses(self, step: int) -> list[Any]:
        return [self.get("loss", step, m) for m in range(self.plan.micro_batches)]

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


def meet(ranks: Sequence[Symbols], ops: Sequence[Op]) -> None:
    """Run an op of each rank together: what it takes from all, it takes in the order of ranks."""
    name, plan, op = ranks[0].name, ranks[0].plan, ops[0]
    both = list(zip(ranks, ops, strict=True))
    if op.kind == "J":
        homes = [("shard", o.shard) if o.shard >= 0 else ("weights", o.unit) for o in ops]
        joined = name("U", op.unit, *(r.get(*home) for r, home in zip(ranks, homes, strict=True)))
        for rank, mine in both:
            rank.memory["slot", mine.slot] = joined
    elif op.kind == "T":
        given = [rank.get("grad_slot", mine.grad_slot) for rank, mine in both]
        for rank, mine in both:
            held = () if mine.first else (rank.get("grad_shard", mine.grad_shard),)
            rank.memory["grad_shard", mine.grad_shard] = _total(rank, held, given)
    elif op.kind == "V":
        rows = tuple(one for rank in ranks for one in _rows(rank.get("row_grads")))
        for rank, mine in both:
            exact = plan.reduction == "exact"
            sums = (*(() if mine.first else _rows(rank.get("row_sums"))), *rows) if exact else rows
            if exact:
                rank.memory[("row_sums",)] = sums
            if mine.grad_shard >= 0:
                held = rank.get("grad_shard", mine.grad_shard) if plan.tied else None
                rank.memory["grad_shard", mine.grad_shard] = name("table", held, sums)
    elif op.kind == "N":
        clip = name("N", *(rank.get("sqnorm", k) for rank in ranks for k in sorted(plan.trainable)))
        for rank in ranks:
            rank.memory[("clip",)] = clip
    else:
        seen = [x for rank in ranks for x in (rank.get("sqnorm", op.unit), *rank.losses(op.step))]
        look = name("look", *seen)
        for rank, mine in both:
            rank.update(mine, look)


def _total(rank: Symbols, held: tuple, given: Sequence[Any]) -> Any:
    """Add what all ranks give to what is held."""
    if rank.plan.reduction == "exact":
        for one in given:
            held = (rank.name("sum", held, rank.alone.get(one, ("a sum already", one))),)
        return held[0]
    reduced = given[0] if len(given) == 1 else rank.name("reduced", *given)
    return rank.name("sum", held, reduced) if held else reduced


def _rows(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def reference(plan: StepSpec, symbols: Symbols) -> dict[tuple, Any]:
    """Two steps as one would write them with every unit in its own memory: no slots, no lanes."""
    return references(plan, [symbols])[0]


def references(plan: StepSpec, ranks: Sequence[Symbols]) -> list[dict[tuple, Any]]:
    """The same for each of several ranks."""
    name, micro_batches, head = ranks[0].name, range(plan.micro_batches), plan.head
    weights: list[dict[int, Any]] = [{u: ("initial", u, *r.mark) for u in range(head + 2)} for r in ranks]
    state = [dict(one) for one in weights]
    outcomes: list[dict[tuple, Any]] = [{} for _ in ranks]
    for step in range(STEPS):
        for r, outcome in enumerate(outcomes):
            outcome |= {("written", step, u): (weights[r][u], state[r][u]) for u in plan.saved}
        used = plan.uploaded | plan.resident
        on_device = {
            u: name("U", u, *(w[u] for w in weights)) if u in used else None for u in range(head + 2)
        }
        found = [_passes(plan, rank, on_device, step) for rank in ranks]
        for outcome, (losses, _) in zip(outcomes, found, strict=True):
            outcome |= {("loss", step, m): losses[m] for m in micro_batches}
        gradients = [one for _, one in found]
        sums = {u: _sum(plan, name, u, [g[u] for g in gradients]) for u in plan.trainable - {head + 1}}
        table = plan.embedding_unit
        if table in plan.trainable and not plan.embedding_frozen:
            rows = [g[0] for g in gradients]
            in_order = zip(*rows, strict=True) if plan.reduction != "fast" else rows
            sums[table] = name("table", sums.get(table), tuple(one for some in in_order for one in some))
        grads = {u: name("D", u, total) for u, total in sums.items()}
        clip = name("N", *(grads[k] for _ in ranks for k in sorted(plan.trainable)))
        for u in plan.trainable:
            scale = clip
            if plan.update == "eager":
                seen = [x for losses, _ in found for x in (grads[u], *losses)]
                scale = name("look", *seen)
            for r in range(len(ranks)):
                wanted = (weights[r][u], state[r][u], grads[u], scale)
                weights[r][u], state[r][u] = name("O", u, *wanted), name("M", u, *wanted)
    for r, outcome in enumerate(outcomes):
        outcome |= {("weights", u): w for u, w in weights[r].items()}
        outcome |= {("state", u): s for u, s in state[r].items()}
    return outcomes


def _passes(
    plan: StepSpec, rank: Symbols, on_device: dict[int, Any], step: int
) -> tuple[list[Any], dict[int, list[Any]]]:
    """The losses of a rank's micro-batches, and their gradients by unit."""
    name, head = rank.name, plan.head
    losses: list[Any] = []
    gradients: dict[int, list[Any]] = {u: [] for u in range(head + 1)}
    for m in range(plan.micro_batches):
        data = ("batch", step, m, *rank.mark)
        inputs = [name("rows", on_device[plan.embedding_unit], data)]
        arguments, routers = name("call", inputs[0], on_device[0]), None
        for u in range(head):
            inputs.append(name("F", u, on_device[u], inputs[u], arguments))
            routers = name("routers", routers, inputs[u], on_device[u]) if u else None
        above = name("L", head, on_device[head], inputs[head], data, (arguments, routers))
        losses.append(above)
        gradients[head].append(above)
        for u in range(head - 1, -1, -1):
            call = (arguments, routers) if u else arguments
            above = name("B", u, on_device[u], inputs[u], above, call)
            gradients[u].append(above)
    return losses, gradients


def _sum(plan: StepSpec, name: Callable[..., Any], unit: int, given: Sequence[Sequence[Any]]) -> Any:
    """Add up a unit's gradients, given by rank and micro-batch: one by one; with `fast` each rank's own of a
    round first, of the head's those of all rounds."""
    total: tuple = ()
    if plan.reduction != "fast":
        for one in (one for position in zip(*given, strict=True) for one in position):
            total = (name("sum", total, one),)
        return total[0]
    every = range(plan.micro_batches)
    parts = [every] if unit == plan.head else [plan.micro_batches_of(k) for k in range(plan.rounds)]
    for part in parts:
        mine = []
        for gradients in given:
            own: tuple = ()
            for m in part:
                own = (name("sum", own, gradients[m]),)
            mine.append(own[0])
        reduced = mine[0] if len(mine) == 1 else name("reduced", *mine)
        total = (name("sum", total, reduced) if total else reduced,)
    return total[0]


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
