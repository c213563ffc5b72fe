"""Ranks: this process among those of a run.

Collectives move whole tensors between all ranks and are called by all of them in the same order. Tensors of
the step's data go through the device's group (NCCL, or Gloo on the CPU), on the network lane alone. Small
values of the host go through Gloo groups of their own, one per `Channel`, so that threads do not wait for
each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import torch


class Channel(StrEnum):
    """A group for values of the host, used by one thread at a time: DISK by that of the disk, UPDATE and
    DEVICE_UPDATE by those of their lanes (UPDATE also by the caller, between steps), MAIN by the caller."""

    MAIN = "main"
    UPDATE = "update"
    DEVICE_UPDATE = "device_update"
    DISK = "disk"


class Place(NamedTuple):
    """The number of this process and of all, and the same among those of its node. core_sharers: processes of
    the node that may run on the cores of this one, itself included."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    core_sharers: int = 1


class Ranks:
    """One rank alone; the base of `TorchRanks`.

    rank, world: number of this process, and of all. local_rank, local_world: the same among those of its
    node. core_sharers: processes that share the cores of this one, itself included.

    Counters of this rank since the start: bytes_sent: what leaves the process by collectives of the network
    lane: of an all-gather (world - 1) times its own tensor, of the others (world - 1) / world of the tensor
    given. network_seconds: in these collectives, waiting for other ranks included (on CUDA: until they are
    issued). wait_seconds: in exchanges of each channel.
    """

    rank = 0
    world = 1
    local_rank = 0
    local_world = 1
    core_sharers = 1
    bytes_sent = 0
    network_seconds = 0.0
    wait_seconds: Mapping[Channel, float] = MappingProxyType(dict.fromkeys(Channel, 0.0))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def at(self, op: str) -> None:
        """Name the op of this thread, for the messages of all ranks if one fails. Costs next to nothing."""

    def publish_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one failed, so that they end with its number, op and error.

        Errors that are raised on all ranks (`is_shared`, stops) are not told. Call it where an error ends the
        run of this rank.
        """

    # Tensors on the device, on the network lane

    def all_gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        """Fill out [world * n] with `own` [n] of each rank, in the order of ranks. Any dtype."""
        out.copy_(own)

    def all_to_all(self, given: torch.Tensor, out: torch.Tensor) -> None:
        """Send the r-th of `world` equal parts of `given` [world * n] to rank r; out [world * n] is what each
        rank sent to this one, in the order of ranks. Any dtype."""
        out.copy_(given)

    def reduce_scatter(self, given: torch.Tensor, out: torch.Tensor) -> None:
        """Fill out [n] with this rank's part of the sum of `given` [world * n] over ranks, in fp32. The same
        bits in each run."""
        out.copy_(given)

    # Tensors of the host: parts of the store for whole views, exports, evaluations

    def gather(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor] | None:
        """Return the tensor [n] of each rank on rank 0, None on others. One shape, any dtype, host memory."""
        return [own]

    def gather_all(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor]:
        """Return the tensor [n] of each rank, on all ranks. One shape, any dtype, host memory."""
        return [own]

    # Small values

    def exchange(self, value: Any, channel: Channel = Channel.MAIN) -> list[Any]:
        """Return the JSON value of each rank (NaN and infinities included), on all ranks."""
        return [value]

    def from_first(self, value: Any, channel: Channel = Channel.MAIN) -> Any:
        """Return rank 0's JSON value on all ranks; others' `value` is ignored."""
        return value

    def barrier(self, channel: Channel = Channel.MAIN) -> None:
        """Wait until all ranks are here."""

    def pass_on(self, value: list[float], add: Any, channel: Channel = Channel.UPDATE) -> list[float]:
        """Pass fp64 numbers from rank to rank: each returns add(numbers of the rank before; `value` on rank
        0), and all get the last rank's result. For sums whose order of additions is that of one rank."""
        return list(add(value))


ALONE = Ranks()
