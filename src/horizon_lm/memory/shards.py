"""Shards: which elements of each unit a rank holds.

The frozen part, its wide end and the trainable part of a unit are each cut into `world` equal ranges of whole
blocks, of which rank r holds the r-th; the last ranges are padded, so that collectives move equal sizes:

    unit    frozen ....... | frozen wide | trainable wide | trainable ..........
    cut     [ r0 | r1 | r2 ] [ r0 | r1 ..] [ r0          | r1           | r2    ]pad

A rank's run of weights is its range of the frozen part, then its range of the trainable one; its run of
residuals the range of the frozen wide part, then the trainable one; its runs of moments and gradients the
range of the trainable part. One rank holds whole units without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from horizon_lm.memory.layout import Parameter, UnitLayout

# Elements. Squared norms are sums of blocks of this size (csrc/gradients.cpp), so that a norm is the same for
# any number of ranks.
BLOCK = 4096


@dataclass(frozen=True)
class Shard:
    """The share of one rank: `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def share(self, numel: int) -> int:
        """Elements that each rank holds of a part of `numel`, padding included."""
        return numel if self.world == 1 else -(-numel // (self.world * BLOCK)) * BLOCK

    def range(self, numel: int) -> tuple[int, int]:
        """The elements [start, stop) of a part of `numel` that this rank holds; empty for a late rank."""
        share = self.share(numel)
        return min(numel, self.rank * share), min(numel, (self.rank + 1) * share)


WHOLE = Shard()


class Piece(NamedTuple):
    """Elements that a rank holds: [start, stop) of a flattened parameter or of a unit's whole run, at
    `offset` in the rank's run of the region."""

    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class UnitShard:
    """What a rank holds of a unit. begin: elements of the unit before its run of weights, which one rank
    alone may store elsewhere: packed ones, and the frozen ones of a split unit."""

    layout: UnitLayout
    shard: Shard = WHOLE
    begin: int = 0

    @property
    def frozen_share(self) -> int:
        """Elements of the frozen part, padding included."""
        return self.shard.share(self.layout.trainable_offset - self.begin)

    @property
    def frozen_wide_share(self) -> int:
        return self.shard.share(self.layout.trainable_offset - self.layout.wide_offset)

    @property
    def trainable_share(self) -> int:
        """Elements of moments and gradients, padding included."""
        return self.shard.share(self.layout.trainable_numel)

    @property
    def weights_numel(self) -> int:
        return self.frozen_share + self.trainable_share

    @property
    def residual_numel(self) -> int:
        return self.frozen_wide_share + self.trainable_share

    @property
    def trainable_range(self) -> tuple[int, int]:
        """The elements [start, stop) of the unit's trainable part that this rank holds."""
        return self.shard.range(self.layout.trainable_numel)

    # Gathering. The padding of the frozen part lands where the trainable part is written next, so a slot is
    # the unit's whole run, with room for the padding at its end.

    @property
    def wide_share(self) -> int:
        """Elements at the start of a rank's trainable residuals that, gathered, contain all wide ones."""
        frozen_wide = self.layout.trainable_offset - self.layout.wide_offset
        return min(self.trainable_share, self.layout.wide_numel - frozen_wide)

    @property
    def wide_numel(self) -> int:
        """Elements at the start of a rank's run of residuals that are gathered for wide parameters."""
        return self.frozen_wide_share + self.wide_share

    @property
    def gathered_weights_numel(self) -> int:
        """Elements of the unit's weights in a slot, room for padding included."""
        world, begin = self.shard.world, self.layout.trainable_offset
        return max(world * self.frozen_share, begin + world * self.trainable_share)

    @property
    def gathered_wide_numel(self) -> int:
        """Elements of its wide residuals in a slot, room for padding included."""
        world, begin = self.shard.world, self.layout.trainable_offset - self.layout.wide_offset
        return max(world * self.frozen_wide_share, begin + world * self.wide_share)

    @property
    def slot_numel(self) -> int:
        """Elements of a device slot: weights, and residuals of wide parameters."""
        return self.gathered_weights_numel + self.gathered_wide_numel

    @property
    def gathered_trainable_numel(self) -> int:
        """Elements of a gradient that is sent to its owners: each rank's share, padding included."""
        return self.shard.world * self.trainable_share

    # Where elements lie

    def of_rank(self, rank: int) -> UnitShard:
        """What another rank holds of the unit."""
        return UnitShard(self.layout, Shard(rank, self.shard.world), self.begin)

    def pieces(self, region: str) -> list[Piece]:
        """The elements of the unit's whole run in a region of the store that this rank holds."""
        layout = self.layout
        begin = {"weights": self.begin, "residual": layout.wide_offset}.get(region, layout.trainable_offset)
        middle, found, offset = layout.trainable_offset - begin, [], 0
        for start, stop in ((0, middle), (middle, layout.numel - begin)):
            first, last = self.shard.range(stop - start)
            if first < last:
                found.append(Piece(start + first, start + last, offset))
            offset += self.shard.share(stop - start)
        return found

    def piece(self, region: str, parameter: Parameter) -> Piece | None:
        """Where the rank's run of a region holds elements of the parameter; None if it holds none."""
        if region == "weights":
            return self.weights_piece(parameter)
        return self.residual_piece(parameter) if region == "residual" else self.trainable_piece(parameter)

    def weights_piece(self, parameter: Parameter) -> Piece | None:
        """Where the rank's run of weights holds elements of the parameter; None if it holds none."""
        if parameter.trainable:
            return self._piece(parameter, self.layout.trainable_offset, self.layout.numel, self.frozen_share)
        if parameter.offset < self.begin:
            return None
        return self._piece(parameter, self.begin, self.layout.trainable_offset, 0)

    def residual_piece(self, parameter: Parameter) -> Piece | None:
        """The same in the run of residuals; None also for a parameter without residual."""
        layout = self.layout
        if parameter.trainable:
            return self._piece(parameter, layout.trainable_offset, layout.numel, self.frozen_wide_share)
        if parameter.offset < layout.wide_offset:
            return None
        return self._piece(parameter, layout.wide_offset, layout.trainable_offset, 0)

    def trainable_piece(self, parameter: Parameter) -> Piece | None:
        """The same in runs of moments and gradients; None for a frozen parameter."""
        if not parameter.trainable:
            return None
        return self._piece(parameter, self.layout.trainable_offset, self.layout.numel, 0)

    def _piece(self, parameter: Parameter, begin: int, end: int, local: int) -> Piece | None:
        """begin, end: the part that holds the parameter; local: where the rank's run has its range."""
        first, last = self.shard.range(end - begin)
        at = parameter.offset - begin  # of the parameter in the part
        start, stop = max(at, first), min(at + parameter.numel, last)
        if start >= stop:
            return None
        return Piece(start - at, stop - at, local + start - first)
