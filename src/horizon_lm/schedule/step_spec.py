"""StepSpec: what determines a step's ops, as one immutable value.

Units are numbered 0 (prologue), 1 .. layers, layers + 1 (head). The embedding table is unit layers + 2, or
part of the head if tied. Prologue and layers share a ring of slots; head and embedding table share the outer
slot, numbered after the ring's. Resident units need no weight slot, unless they are gathered from shares. A
split unit is uploaded and resident: its frozen part is streamed, the rest lives on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

UPDATES = ("sync", "deferred", "eager")
RECOMPUTE, ATTENTION, PRODUCTS, KEEP, NOTHING = "recompute", "attention", "products", "keep", ""
SUMS = ("device", "host", "add")
EXACT, FAST = "exact", "fast"
SUM_SLABS = 2
_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class StepSpec:
    """What determines a step's ops.

    layers: number of decoder layers.
    uploaded: units with weights to stream (a prologue often has none), including the embedding table's.
    resident: units that live on the device and are updated there; of those that are uploaded as well, the
        trainable part.
    packed: uploaded units whose frozen part, or some of it, is stored in few bits: uploaded into a staging
        slot, and unpacked into the weight slot.
    trainable: units with a gradient; frozen units have none.
    embedding_unit: unit that owns the embedding table; the head if tied.
    embedding_frozen: the table has no gradient, although other parameters of its unit may.
    micro_batches: of each rank.
    slots, grad_slots: number of slots in the ring, and of buffers for shares of weights and of gradients.
    update: `sync`: all updates at the end of the step; `deferred`: in the next step, each before its unit is
        used; `eager`: each as soon as its gradient is in host memory.
    grad_slabs: with eager updates, host buffers for the gradients of layers, round-robin; head and embedding
        table share one more.
    rounds: groups into which the micro-batches are cut, one after the other, with one update at the end.
    sums: where a gradient waits for the next round, in this and all other steps of a run: `device`: in
        a gradient slot of its own, also in a step of one round; `host`: in host memory, from which it is
        brought back; `add`: the host adds up the gradients of single micro-batches, and the sum is brought
        back for the last one (with larger rounds or in a shared step as `host`); "" in a run without rounds.
        Head and embedding table wait in the outer slot. In a shared step, shares of gradients wait.
    kept: layers (units) that keep their activations instead of recomputing them.
    attention, products: layers that keep only the results of attention, or those of all matrix products too.
    checkpoint_interval: layers per block, recomputed from one stored input.
    spilled: units whose stored inputs wait in host memory between forward and backward.
    boundary_slots: device buffers for restored inputs.
    evaluate: forward pass and loss only.
    saved: units written to a checkpoint during this step, as the previous step left them.
    world: number of ranks, each of which holds a share of every unit.
    reduction: how ranks add up gradients: `exact`: each micro-batch's, in the order of all ranks'
        micro-batches; `fast`: each rank adds up its own of a round first. One rank adds them up where they
        are (""), or as one of several would (`exact`).
    """

    layers: int
    uploaded: frozenset[int]
    trainable: frozenset[int]
    embedding_unit: int
    micro_batches: int = 1
    slots: int = 2
    grad_slots: int = 2
    embedding_frozen: bool = False
    update: str = "sync"
    grad_slabs: int = 2
    kept: frozenset[int] = _NONE
    checkpoint_interval: int = 1
    spilled: frozenset[int] = _NONE
    boundary_slots: int = 2
    evaluate: bool = False
    saved: frozenset[int] = _NONE
    resident: frozenset[int] = _NONE
    packed: frozenset[int] = _NONE
    rounds: int = 1
    sums: str = ""
    attention: frozenset[int] = _NONE
    products: frozenset[int] = _NONE
    world: int = 1
    reduction: str = ""

    def __post_init__(self) -> None:
        lowest = {
            "layers": 1,
            "micro_batches": 1,
            "slots": 2,
            "grad_slots": 1,
            "grad_slabs": 1,
            "checkpoint_interval": 1,
            "boundary_slots": 1,
            "rounds": 1,
            "world": 1,
        }
        for name, bound in lowest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}; hint: a step needs at least {bound}")
        for name in ("slots", "grad_slots"):
            if getattr(self, name) < self.checkpoint_interval:
                raise ValueError(
                    f"{name}={getattr(self, name)} with checkpoint_interval={self.checkpoint_interval}; "
                    "hint: layers that are computed again side by side need a slot each"
                )
        if self.update not in UPDATES:
            raise ValueError(f"update={self.update!r}; hint: {' | '.join(UPDATES)}")
        if self.embedding_unit not in (self.head, self.head + 1):
            raise ValueError(
                f"embedding_unit={self.embedding_unit} is neither the head nor the unit after it"
            )
        if self.embedding_unit not in self.uploaded | self.resident:
            raise ValueError(
                f"embedding_unit={self.embedding_unit} is not uploaded; hint: each step reads it"
            )
        self._check_parts()
        if self.rounds > 1 and (self.evaluate or self.rounds != -(-self.micro_batches // self.round_size)):
            raise ValueError(
                f"rounds={self.rounds} of micro_batches={self.micro_batches}; hint: StepSpec.round_count"
            )
        if self.sums not in SUMS and (self.sums or self.rounds > 1):
            raise ValueError(f"sums={self.sums!r} with rounds={self.rounds}; hint: {' | '.join(SUMS)}")
        reductions = (EXACT, FAST) if self.world > 1 else ("", EXACT)
        if self.reduction not in reductions:
            raise ValueError(
                f"reduction={self.reduction!r} with world={self.world}; hint: "
                + " | ".join(name or '""' for name in reductions)
            )
        policies = (self.kept, self.attention, self.products)
        if sum(map(len, policies)) != len(frozenset().union(*policies)):
            raise ValueError("a layer has two policies; hint: kept, attention and products are disjoint")
        for name in ("kept", "spilled", "attention", "products"):
            strange = sorted(getattr(self, name) - set(range(1, self.head)))
            if strange:
                raise ValueError(f"{name} holds unit {strange[0]}; hint: layers are 1 to {self.layers}")

    def _check_parts(self) -> None:
        """Raise ValueError for units in parts where there are only whole ones."""
        for name in ("split", "packed"):
            units = sorted(getattr(self, name))
            if units and self.is_shared:
                raise ValueError(f"unit {units[0]} is {name}; hint: a rank's share of a unit has one home")
        if not self.packed <= self.uploaded:
            unit = min(self.packed - self.uploaded)
            raise ValueError(f"unit {unit} is packed, but not uploaded; hint: packed parts are streamed")

    @property
    def head(self) -> int:
        return self.layers + 1

    @cached_property
    def split(self) -> frozenset[int]:
        """Units whose frozen part is streamed, and whose trainable part lives on the device."""
        return self.uploaded & self.resident

    @property
    def tied(self) -> bool:
        return self.embedding_unit == self.head

    @property
    def is_shared(self) -> bool:
        """Whether weights are gathered in slots from shares of units, and gradients added up by the owners of
        shares: on several ranks, and on one with `exact`, whose shares are whole units."""
        return self.reduction != ""

    @cached_property
    def in_slots(self) -> frozenset[int]:
        """Units whose weights are read in a slot; residents only if they are gathered from shares."""
        return self.uploaded | self.resident if self.is_shared else self.uploaded

    @property
    def outer_slot(self) -> int:
        """The weight slot of the embedding table, then of the head if it is another unit."""
        return self.slots

    @property
    def outer_grad_slot(self) -> int:
        """The gradient slot of the head, then of the embedding table if it is another unit. In a shared step,
        this is the number of their shard, and of a slot of the head."""
        return self.grad_slots

    @staticmethod
    def round_count(micro_batches: int, rounds: int) -> int:
        """The rounds of a step: `rounds`, or fewer if rounds of equal size are enough."""
        return -(-micro_batches // -(-micro_batches // rounds))

    @property
    def round_size(self) -> int:
        """Micro-batches of a round; the last round may have fewer."""
        return -(-self.micro_batches // self.rounds)

    def micro_batches_of(self, number: int) -> range:
        """The micro-batches of a round."""
        start = number * self.round_size
        return range(start, min(start + self.round_size, self.micro_batches))

    def ends_round(self, m: int) -> bool:
        """Whether a micro-batch is the last of its round."""
        return (m + 1) % self.round_size == 0 or m == self.micro_batches - 1

    @cached_property
    def own_grad_slots(self) -> tuple[int, ...]:
        """Units with a gradient slot of their own, in the order of the slots, which follow the outer one."""
        return self._below_head if self.sums == "device" and not self.is_shared else ()

    @cached_property
    def own_grad_shards(self) -> tuple[int, ...]:
        """The same for shards of gradients, in a shared step."""
        return self._below_head if self.sums == "device" and self.is_shared else ()

    @cached_property
    def host_sums(self) -> frozenset[int]:
        """Units whose gradients wait in host memory between rounds."""
        return frozenset(self._below_head if self.rounds > 1 and self.sums != "device" else ())

    @property
    def _below_head(self) -> tuple[int, ...]:
        return tuple(unit for unit in sorted(self.trainable) if unit < self.head)

    @property
    def adds_on_host(self) -> bool:
        """Whether the host adds up gradients: rounds of one micro-batch give it one gradient at a time, so
        that the order of additions is the same as on the device. Never in a shared step."""
        return self.sums == "add" and self.round_size == 1 and not self.is_shared and bool(self.host_sums)

    def begins(self, unit: int, m: int) -> bool:
        """Whether the gradient of a micro-batch overwrites its slot rather than being added to it."""
        if self.is_shared:
            return self.totals(unit, m - 1) if m else True
        alone = self.adds_on_host and unit in self.host_sums and m < self.micro_batches - 1
        return m == 0 or alone

    def totals(self, unit: int, m: int) -> bool:
        """Whether the unit's gradients are added up over ranks after a micro-batch. With `fast` after the
        last one of a round, since other units need the slot; those of the head once, which has its own."""
        if self.reduction == FAST:
            return self.ends_round(m) if unit < self.head else m == self.micro_batches - 1
        return self.reduction == EXACT

    def begins_total(self, unit: int, m: int) -> bool:
        """Whether the sum over ranks after a micro-batch overwrites the unit's shard."""
        if self.reduction == FAST:
            return m < self.round_size or unit == self.head
        return m == 0

    def totals_rows(self, m: int) -> bool:
        """Whether gradients of the embedding's rows are added up over ranks after a micro-batch."""
        return self.sums_rows and self.totals(self.head, m)

    def continues(self, unit: int, m: int) -> bool:
        """Whether a round that begins with micro-batch m adds to a gradient that waited in host memory."""
        return unit in self.host_sums and m > 0 and (self.is_shared or not self.begins(unit, m))

    def accumulates_in_slot(self, unit: int) -> bool:
        """Whether a gradient needs a slot even if the host buffer could hold it: with eager updates, that of
        a resident unit, and one whose slab other units write to before the sum over micro-batches is
        complete, as in later rounds and in a block with more layers than slabs."""
        if self.update != "eager":
            return False
        is_shared = self.rounds > 1 or self.checkpoint_interval > self.grad_slabs
        return unit in self.resident or (is_shared and self.micro_batches > 1)

    @property
    def sums_rows(self) -> bool:
        """Whether the step sums gradients of the embedding table's rows."""
        return self.embedding_unit in self.trainable and not self.embedding_frozen

    @property
    def lowest_backward(self) -> int:
        """The lowest unit that needs a backward pass: nothing below it has a gradient."""
        if self.sums_rows:
            return 0
        return min(self.trainable, default=self.head)

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The layers with a backward pass, grouped into blocks, lowest first.

        A layer that keeps activations is a block by itself.
        """
        alone = self.kept | self.attention | self.products
        found: list[tuple[int, ...]] = []
        run: list[int] = []
        for unit in range(max(1, self.lowest_backward), self.head):
            if unit in alone or len(run) == self.checkpoint_interval:
                found += [tuple(run)] * bool(run)
                run = []
            if unit in alone:
                found.append((unit,))
            else:
                run.append(unit)
        return (*found, *[tuple(run)] * bool(run))

    @cached_property
    def at_turnaround(self) -> frozenset[int]:
        """Layers of the last block. Their backward directly follows the head, so they are computed once:
        keeping activations then takes no more memory than recomputing them."""
        if self.evaluate or not self.blocks:
            return frozenset()
        return frozenset(self.blocks[-1])

    @property
    def joins_turnaround(self) -> bool:
        """Whether micro-batches pass one by one through the last block, the head and back, so that only one
        holds activations. A block always fits in the ring, and the head has a slot of its own."""
        return not self.evaluate and self.round_size > 1 and bool(self.blocks)

    @cached_property
    def backward_blocks(self) -> tuple[tuple[int, ...], ...]:
        """`blocks`, with the layers at the turnaround, which are computed once, as blocks of their own."""
        found: list[tuple[int, ...]] = []
        for block in self.blocks:
            found += [(u,) for u in block] if self.at_turnaround & set(block) else [block]
        return tuple(found)

    def policy(self, unit: int) -> str:
        """What a layer's forward leaves for its backward: `keep` (all it needs), `recompute` (a graph that
        recomputes it), `attention` or `products` (a graph that recomputes all but these results), or nothing
        (inside a block, and below the lowest unit with a backward pass)."""
        if self.evaluate or unit < max(1, self.lowest_backward):
            return NOTHING
        if unit in self.kept | self.at_turnaround:
            return KEEP
        if unit in self.attention:
            return ATTENTION
        if unit in self.products:
            return PRODUCTS
        return RECOMPUTE if unit in self._last_of_blocks else NOTHING

    def stores_input(self, unit: int) -> bool:
        """Whether a layer's input is stored from its forward to its backward pass."""
        return not self.evaluate and unit in self._first_of_blocks | self.at_turnaround

    def is_spilled(self, unit: int) -> bool:
        """Whether that input waits in host memory. Kept activations are never spilled."""
        return unit in self.spilled and self.stores_input(unit) and self.policy(unit) != KEEP

    @cached_property
    def _first_of_blocks(self) -> frozenset[int]:
        return frozenset(block[0] for block in self.blocks)

    @cached_property
    def _last_of_blocks(self) -> frozenset[int]:
        return frozenset(block[-1] for block in self.blocks)

    @cached_property
    def visits(self) -> list[tuple[int, ...]]:
        """Units in the order in which the compute lane visits them in a round, grouped by visit."""
        forward: list[tuple[int, ...]] = [(unit,) for unit in range(self.head + 1)]
        if self.evaluate:
            return forward
        backward = list(reversed(self.backward_blocks))
        if self.joins_turnaround:
            block = self.blocks[-1]
            forward[block[0] :] = [(*block, self.head)]
            backward = backward[len(block) :]
        prologue: list[tuple[int, ...]] = [(0,)] if self.lowest_backward == 0 else []
        return [*forward, *backward, *prologue]

    def slab(self, unit: int) -> int:
        """The slab of an eager unit's gradient; -1 if it has its own place in the store, or is resident."""
        if self.update != "eager" or unit in self.resident:
            return -1
        return self.grad_slabs if unit >= self.head else unit % self.grad_slabs
