"""Ranks as threads of one process, for tests of what ranks hold and send. Their collectives copy tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from horizon_lm.distributed.ranks import Channel, Ranks
from horizon_lm.errors import RankError

Result = TypeVar("Result")


class _Board:
    """What each rank shows the others."""

    def __init__(self, world: int) -> None:
        self.shown: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)


class ThreadedRanks(Ranks):
    """boards: one for each channel, which a thread of its own may use."""

    def __init__(self, rank: int, world: int, boards: Mapping[Channel, _Board]) -> None:
        self.rank, self.world, self._boards = rank, world, boards

    def _share(self, value: Any, channel: Channel = Channel.MAIN) -> list[Any]:
        board = self._boards[channel]
        board.shown[self.rank] = value
        board.barrier.wait()
        found = list(board.shown)
        board.barrier.wait()
        return found

    def exchange(self, value: Any, channel: Channel = Channel.MAIN) -> list[Any]:
        try:
            return [json.loads(text) for text in self._share(json.dumps(value), channel)]
        except threading.BrokenBarrierError as error:
            raise RankError("another rank is lost") from error

    def from_first(self, value: Any, channel: Channel = Channel.MAIN) -> Any:
        return self.exchange(value if self.is_first else None, channel)[0]

    def leave(self) -> None:
        """Be lost to the others."""
        for board in self._boards.values():
            board.barrier.abort()

    def all_gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        assert out.numel() == self.world * own.numel()
        out.copy_(torch.cat(self._share(own.clone())))

    def all_to_all(self, given: torch.Tensor, out: torch.Tensor) -> None:
        assert given.numel() == out.numel()
        out.copy_(torch.cat([other.chunk(self.world)[self.rank] for other in self._share(given.clone())]))

    def gather(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor] | None:
        found = self.gather_all(own, channel)
        return found if self.is_first else None

    def gather_all(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._share(own.clone(), channel)
        assert len({(value.shape, value.dtype) for value in found}) == 1
        return found

    def pass_on(self, value: list[float], add: Any, channel: Channel = Channel.UPDATE) -> list[float]:
        for rank in range(self.world):
            value = self._share(list(add(value)) if rank == self.rank else None, channel)[rank]
        return value


def on_ranks(world: int, function: Callable[[ThreadedRanks], Result]) -> list[Result]:
    """Call the function on each of `world` ranks at once; its results, by rank."""
    boards = {channel: _Board(world) for channel in Channel}

    def call(rank: int) -> Result:
        ranks = ThreadedRanks(rank, world, boards)
        try:
            return function(ranks)
        except BaseException:
            ranks.leave()
            raise

    with ThreadPoolExecutor(world) as pool:
        jobs = [pool.submit(call, rank) for rank in range(world)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    for error in errors:
        if not isinstance(
            error, threading.BrokenBarrierError | RankError
        ):  # which follows another rank's error
            raise error
    if errors:
        raise errors[0]
    return [job.result() for job in jobs]
