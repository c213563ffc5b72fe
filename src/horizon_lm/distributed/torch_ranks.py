"""Ranks on torch.distributed: NCCL between GPUs, Gloo between CPUs and for all values of the host.

Only `horizon_lm.distributed.start` imports this module, and only for more than one rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from horizon_lm.distributed.ranks import Channel, Place, Ranks
from horizon_lm.distributed.watch import Watch

# A value of up to this many bytes as JSON is exchanged in one collective, with its size in front of it.
_FRAME = 248
_SIZE = 8  # bytes of a size
_PIECE = 1 << 20  # elements of a rank that a reduction on the host receives at once
# Renamed in torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchRanks(Ranks):
    """The ranks of a process group.

    device_group: for tensors of the step, on the network lane. channels: a Gloo group for each channel. With
    a watch every collective raises RankError, which names the rank, if one failed or was lost.
    """

    def __init__(
        self, place: Place, device_group: Any, channels: dict[Channel, Any], watch: Watch | None = None
    ) -> None:
        self.rank, self.world = place.rank, place.world
        self.local_rank, self.local_world = place.local_rank, place.local_world
        self.core_sharers = place.core_sharers
        self._device, self._channels = device_group, channels
        self._watch = watch
        self._on_host = dist.get_backend(device_group) == "gloo"
        self._pieces: torch.Tensor | None = None
        self.wait_seconds: dict[Channel, float] = dict.fromkeys(Channel, 0.0)

    def at(self, op: str) -> None:
        if self._watch is not None:
            self._watch.at(op)

    def publish_failure(self, error: BaseException) -> None:
        if self._watch is not None:
            self._watch.tell(error)

    # Tensors on the device

    def all_gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        assert out.numel() == own.numel() * self.world and out.dtype == own.dtype
        with self._on_network("all-gather", own.nbytes * (self.world - 1)):
            if self._on_host:
                self._swap(self._repeated(own), _bytes(out).view(self.world, -1), self._device)
            else:
                _all_gather_single(_bytes(out), _bytes(own), group=self._device)

    def all_to_all(self, given: torch.Tensor, out: torch.Tensor) -> None:
        assert out.numel() == given.numel() and given.numel() % self.world == 0 and out.dtype == given.dtype
        with self._on_network("all-to-all", given.nbytes // self.world * (self.world - 1)):
            dist.all_to_all_single(_bytes(out), _bytes(given), group=self._device)

    def reduce_scatter(self, given: torch.Tensor, out: torch.Tensor) -> None:
        assert given.numel() == out.numel() * self.world and given.dtype == out.dtype == torch.float32
        with self._on_network("reduce-scatter", given.nbytes // self.world * (self.world - 1)):
            if self._on_host:
                self._add_parts(given.view(self.world, -1), out)
            else:
                _reduce_scatter_single(out, given, group=self._device)

    def _add_parts(self, given: torch.Tensor, out: torch.Tensor) -> None:
        """Fill out [n] with the sum of given[rank] [n] of each rank, added in their order, piece by piece.

        Gloo's own reduces all of `given` on each rank, and takes 2 to 4 times as long.
        """
        if self._pieces is None:
            self._pieces = torch.empty(self.world, _PIECE)
        for start in range(0, out.numel(), _PIECE):
            total = out[start : start + _PIECE]
            pieces = self._pieces[:, : len(total)]
            self._swap(given[:, start : start + _PIECE], pieces, self._device)
            total.copy_(pieces[0])
            for piece in pieces[1:]:
                total += piece

    def _swap(self, given: torch.Tensor, parts: torch.Tensor, group: Any) -> None:
        """Send given[other] to each rank, and receive parts[other] from it; both [world, n]. Over Gloo.

        For an all-gather it takes a half to a quarter of the time of Gloo's own.
        """
        if parts.numel() == 0:
            return
        others = [rank for rank in range(self.world) if rank != self.rank]
        works = [dist.irecv(parts[other], other, group=group) for other in others]
        works += [dist.isend(given[other], other, group=group) for other in others]
        parts[self.rank].copy_(given[self.rank])
        for work in works:
            assert work is not None
            work.wait()

    def _repeated(self, own: torch.Tensor) -> torch.Tensor:
        """View the bytes of a tensor once for each rank: [world, n]."""
        return _bytes(own).expand(self.world, -1)

    # Tensors of the host

    def gather(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor] | None:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.is_first else None
        if own.numel():
            with self._on_channel("gather", channel) as group:
                dist.gather(_bytes(own), parts and [_bytes(part) for part in parts], group=group)
        return parts

    def gather_all(self, own: torch.Tensor, channel: Channel = Channel.MAIN) -> list[torch.Tensor]:
        own = own.contiguous()
        parts = own.new_empty(self.world, *own.shape)
        with self._on_channel("gather", channel) as group:
            self._swap(self._repeated(own), _bytes(parts).view(self.world, -1), group)
        return list(parts.unbind())

    # Small values

    def exchange(self, value: Any, channel: Channel = Channel.MAIN) -> list[Any]:
        text = json.dumps(value).encode()
        frames = self._gather_text(text[:_FRAME], _FRAME, len(text), channel)
        sizes = [size for size, _ in frames]
        if max(sizes) > _FRAME:  # the same decision on all ranks
            frames = self._gather_text(text, max(sizes), len(text), channel)
        return [json.loads(frame[:size]) for size, frame in frames]

    def from_first(self, value: Any, channel: Channel = Channel.MAIN) -> Any:
        text = json.dumps(value).encode() if self.is_first else b""
        with self._on_channel("broadcast", channel) as group:
            size = torch.tensor([len(text)], dtype=torch.int64)
            dist.broadcast(size, 0, group=group)
            body = _tensor(text) if self.is_first else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(body, 0, group=group)
        return json.loads(body.numpy().tobytes())

    def barrier(self, channel: Channel = Channel.MAIN) -> None:
        with self._on_channel("barrier", channel) as group:
            dist.barrier(group=group)

    def pass_on(
        self, value: list[float], add: Callable[[list[float]], list[float]], channel: Channel = Channel.UPDATE
    ) -> list[float]:
        numbers = torch.tensor(value, dtype=torch.float64)
        with self._on_channel("chain", channel) as group:
            if self.rank > 0:
                dist.recv(numbers, self.rank - 1, group=group)
            numbers.copy_(torch.tensor(add(numbers.tolist()), dtype=torch.float64))
            if self.rank + 1 < self.world:
                dist.send(numbers, self.rank + 1, group=group)
            dist.broadcast(numbers, self.world - 1, group=group)
        return numbers.tolist()

    def _gather_text(self, text: bytes, room: int, size: int, channel: Channel) -> list[tuple[int, bytes]]:
        """Return (size, up to `room` bytes of text) of each rank."""
        own = _tensor(size.to_bytes(_SIZE, "little") + text.ljust(room, b" "))
        frames = [frame.numpy().tobytes() for frame in self.gather_all(own, channel)]
        return [(int.from_bytes(frame[:_SIZE], "little"), frame[_SIZE:]) for frame in frames]

    @contextmanager
    def _on_network(self, kind: str, sent: int) -> Iterator[None]:
        start = time.perf_counter()
        with self._watched("network", kind):
            yield
        self.bytes_sent += sent
        self.network_seconds += time.perf_counter() - start

    @contextmanager
    def _on_channel(self, kind: str, channel: Channel) -> Iterator[Any]:
        start = time.perf_counter()
        with self._watched(channel, kind):
            yield self._channels[channel]
        self.wait_seconds[channel] += time.perf_counter() - start

    @contextmanager
    def _watched(self, where: str, kind: str) -> Iterator[None]:
        """Raise RankError for a lost connection, and instead of a collective after a failure."""
        if self._watch is None:
            yield
            return
        with self._watch.collective(kind, where) as name:
            try:
                yield
            except RuntimeError as error:
                if not _is_lost_connection(error):
                    raise
                raise self._watch.cause(error, name) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Tell errors of Gloo and NCCL from others (memory, shapes)."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error) or "NCCL" in str(error)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes: Gloo lacks some types (int16)."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
