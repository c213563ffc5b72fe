"""Shards: which elements of each unit a rank holds.

The frozen part, its wide end and the trainable part of a unit are each cut into `world` equal ranges of whole
blocks, of which rank r holds the r-th; the last ranges are padded, so that collectives move equal sizes:

    unit    frozen ....... | frozen wide | trainable wide | trainable ..........
    cut     [ r0 | r1 | r2 ] [ r0 | r1 ..] [ r0          | r1           | r2    ]pad

A rank's run of weights is its range of the frozen part, then its range of the trainable one; its run of
residuals the range of the frozen wide part, then the trainable one. One rank holds whole units without
padding, in today's order.
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
    """Elements of a parameter that a rank holds: [start, stop) of the flattened parameter, at `offset` in the
    rank's run of the region."""

    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class UnitShard:
    """What a rank holds of a unit."""

    layout: UnitLayout
    shard: Shard = WHOLE

    @property
    def frozen_share(self) -> int:
        """Elements of the frozen part, padding included."""
        return self.shard.share(self.layout.trainable_offset)

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

    def weights_piece(self, parameter: Parameter) -> Piece | None:
        """Where the rank's run of weights holds elements of the parameter; None if it holds none."""
        if parameter.trainable:
            return self._piece(parameter, self.layout.trainable_offset, self.layout.numel, self.frozen_share)
        return self._piece(parameter, 0, self.layout.trainable_offset, 0)

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
