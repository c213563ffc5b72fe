"""Which micro-batches of a step this rank computes."""

from __future__ import annotations

from dataclasses import dataclass

from horizon_lm.distributed.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Positions:
    """Micro-batch g of a step's `total` is at position g // world of rank g % world.

    Every rank has the same number of positions. Those beyond the last micro-batch are empty: their ops
    compute nothing and their gradients count nowhere.
    """

    total: int = 0
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, total: int, ranks: Ranks = ALONE) -> Positions:
        return cls(total, ranks.rank, ranks.world)

    def __len__(self) -> int:
        return -(-self.total // self.world)

    def number(self, position: int) -> int:
        """The number of the micro-batch at a position, among those of all ranks."""
        return position * self.world + self.rank

    def is_empty(self, position: int) -> bool:
        return self.number(position) >= self.total

    def present(self, position: int) -> int:
        """How many ranks, from rank 0 on, have a micro-batch at a position."""
        return min(self.world, self.total - position * self.world)

    @property
    def numbers(self) -> list[int]:
        """Micro-batches of this rank, ascending."""
        return list(range(self.rank, self.total, self.world))
