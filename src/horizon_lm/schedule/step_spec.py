"""What the builder needs to know of a model and its settings: one immutable value.

Units are numbered 0 (prologue), 1 .. layers, layers + 1 (head). The embedding table is never
uploaded: it is unit layers + 2, or part of the head when the two are tied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

UPDATES = ("sync", "deferred", "eager")
RECOMPUTE, KEEP, NOTHING = "recompute", "keep", ""


@dataclass(frozen=True)
class StepSpec:
    """The spec of a step.

    layers: number of decoder layers.
    uploaded: units that have weights to stream (a prologue often has none).
    trainable: units that have a gradient; a unit of frozen parameters has none.
    embedding_unit: unit that owns the embedding table; the head when tied.
    embedding_frozen: the table has no gradient, although other parameters of its unit may have one.
    update: `sync` all updates at the end of the step; `deferred` in the next step, each before its unit
        is used; `eager` each as soon as its gradient is in host memory.
    grad_slabs: with eager updates, host buffers through which the gradients of layers pass in turn;
        head and embedding table share one more.
    kept: layers (units) that keep what their backward needs instead of computing it again.
    checkpoint_interval: layers that are computed again from one stored input, side by side.
    spilled: units whose stored inputs live in host memory between forward and backward.
    boundary_slots: device buffers through which they come back.
    evaluate: a forward pass and the loss alone.
    saved: units that are written to a checkpoint, as the step before left them, while this step runs.
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
    kept: frozenset[int] = field(default_factory=frozenset)
    checkpoint_interval: int = 1
    spilled: frozenset[int] = field(default_factory=frozenset)
    boundary_slots: int = 2
    evaluate: bool = False
    saved: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        lowest = {
            "layers": 1,
            "micro_batches": 1,
            "slots": 2,
            "grad_slots": 1,
            "grad_slabs": 1,
            "checkpoint_interval": 1,
            "boundary_slots": 1,
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
        for name in ("kept", "spilled"):
            strange = sorted(getattr(self, name) - set(range(1, self.head)))
            if strange:
                raise ValueError(f"{name} holds unit {strange[0]}; hint: layers are 1 to {self.layers}")

    @property
    def head(self) -> int:
        return self.layers + 1

    @property
    def tied(self) -> bool:
        return self.embedding_unit == self.head

    @property
    def scatters(self) -> bool:
        """Whether gradient rows are added to the embedding table's gradient."""
        return self.embedding_unit in self.trainable and not self.embedding_frozen

    @property
    def lowest_backward(self) -> int:
        """The first unit whose backward pass is needed: nothing below it has a gradient."""
        if self.scatters:
            return 0
        return min(self.trainable, default=self.head)

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The layers with a backward pass, cut into what is computed again together, lowest first.

        A layer that keeps its activations is a block by itself.
        """
        found: list[tuple[int, ...]] = []
        run: list[int] = []
        for unit in range(max(1, self.lowest_backward), self.head):
            if unit in self.kept or len(run) == self.checkpoint_interval:
                found += [tuple(run)] * bool(run)
                run = []
            if unit in self.kept:
                found.append((unit,))
            else:
                run.append(unit)
        return (*found, *[tuple(run)] * bool(run))

    @cached_property
    def at_turn(self) -> frozenset[int]:
        """Layers of the last block, which are computed once, where their backward can follow the head at
        once: keeping what it needs takes no more then than computing it again."""
        if self.evaluate or not self.blocks:
            return frozenset()
        return frozenset(self.blocks[-1]) if self.micro_batches == 1 or self.joins_turn else frozenset()

    @cached_property
    def joins_turn(self) -> bool:
        """Whether several micro-batches pass one after another through the last block, the head and back
        again, so that but one of them at a time holds activations. Then the weights and the gradients of
        all these units are on the device together."""
        if self.evaluate or self.micro_batches == 1 or not self.blocks:
            return False
        units = {*self.blocks[-1], self.head}
        return len(units & self.uploaded) <= self.slots and len(units & self.trainable) <= self.grad_slots

    @cached_property
    def backward_blocks(self) -> tuple[tuple[int, ...], ...]:
        """`blocks` with the layers at the turn, which are computed once, as blocks of their own."""
        found: list[tuple[int, ...]] = []
        for block in self.blocks:
            found += [(u,) for u in block] if self.at_turn & set(block) else [block]
        return tuple(found)

    def policy(self, unit: int) -> str:
        """What the forward pass of a layer leaves for its backward: `keep` all that it needs,
        `recompute` a graph that computes it again, or nothing (inside of a block, and below the
        lowest unit with a backward pass)."""
        if self.evaluate or unit < max(1, self.lowest_backward):
            return NOTHING
        if unit in self.kept | self.at_turn:
            return KEEP
        return RECOMPUTE if unit in self._last_of_blocks else NOTHING

    def stores_input(self, unit: int) -> bool:
        """Whether a layer's input stays from its forward to its backward pass."""
        return not self.evaluate and unit in self._first_of_blocks | self.kept | self.at_turn

    def is_spilled(self, unit: int) -> bool:
        """Whether that input waits in host memory. What a layer keeps is never spilled."""
        return unit in self.spilled and self.stores_input(unit) and self.policy(unit) != KEEP

    @cached_property
    def _first_of_blocks(self) -> frozenset[int]:
        return frozenset(block[0] for block in self.blocks)

    @cached_property
    def _last_of_blocks(self) -> frozenset[int]:
        return frozenset(block[-1] for block in self.blocks)

    @property
    def visits(self) -> list[tuple[int, ...]]:
        """Units in the order in which the compute lane visits them; those of one visit side by side."""
        forward: list[tuple[int, ...]] = [(unit,) for unit in range(self.head + 1)]
        if self.evaluate:
            return forward
        backward = list(reversed(self.backward_blocks))
        if self.joins_turn:
            block = self.blocks[-1]
            forward[block[0] :] = [(*block, self.head)]
            backward = backward[len(block) :]
        prologue: list[tuple[int, ...]] = [(0,)] if self.lowest_backward == 0 else []
        return [*forward, *backward, *prologue]

    def slab(self, unit: int) -> int:
        """The host buffer through which an eager unit's gradient passes; -1 where it has a place of
        its own."""
        if self.update != "eager":
            return -1
        return self.grad_slabs if unit >= self.head else unit % self.grad_slabs
