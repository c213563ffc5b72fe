"""Ranks that share a device: their collectives pass through host memory, over Gloo."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from horizon_lm.distributed.ranks import Channel, Place
from horizon_lm.distributed.torch_ranks import TorchRanks


class Staged(TorchRanks):
    """Ranks on one device, which NCCL refuses."""

    @classmethod
    def of_this_process(cls) -> Staged:
        """Connect to the ranks that the environment names."""
        dist.init_process_group("gloo")
        place = Place(dist.get_rank(), dist.get_world_size(), 0, dist.get_world_size())
        return cls(place, dist.new_group(backend="gloo"), _channels())

    def all_gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        self._through_host(super().all_gather, own, out)

    def all_to_all(self, given: torch.Tensor, out: torch.Tensor) -> None:
        self._through_host(super().all_to_all, given, out)

    def reduce_scatter(self, given: torch.Tensor, out: torch.Tensor) -> None:
        self._through_host(super().reduce_scatter, given, out)

    @staticmethod
    def _through_host(collective: Any, given: torch.Tensor, out: torch.Tensor) -> None:
        """Copy there and back on the current stream: what the lane waited for holds for the copies."""
        if given.device.type == "cpu":
            collective(given, out)
            return
        found = torch.empty(out.shape, dtype=out.dtype)
        collective(given.cpu(), found)
        out.copy_(found)


def _channels() -> dict[Channel, Any]:
    return {channel: dist.new_group(backend="gloo") for channel in Channel}


def world_of_one(backend: str) -> TorchRanks:
    """Return this process as a world of one, with a device group of `backend`."""
    place = Path(tempfile.mkdtemp()) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    return TorchRanks(Place(), dist.new_group(backend=backend), _channels())
