"""Start: find this process's place among the ranks of a run, and connect to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from horizon_lm.distributed.ranks import ALONE, Channel, Place, Ranks
from horizon_lm.errors import ConfigError

_joined: dict[tuple[Any, str], Ranks] = {}  # by default group and backend
_TIMEOUT = timedelta(hours=12)  # heartbeats find lost ranks; others may work alone for long


def join(device: str) -> Ranks:
    """Return the ranks of this run; ALONE if there is one.

    device: setting `device`. Uses the default process group if there is one, else makes it from the variables
    of torchrun. Collective the first time.
    """
    place = _place(os.environ)
    if place.world == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    from horizon_lm.distributed.torch_ranks import TorchRanks

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=place.rank, world_size=place.world, timeout=_TIMEOUT)
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    key = dist.group.WORLD, "nccl" if on_gpu else "gloo"
    if key not in _joined:
        group = dist.new_group(backend=key[1], timeout=_TIMEOUT)
        channels = {channel: dist.new_group(backend="gloo", timeout=_TIMEOUT) for channel in Channel}
        _joined[key] = TorchRanks(place, group, channels)
    return _joined[key]


def _place(environment: Mapping[str, str]) -> Place:
    module = sys.modules.get("torch.distributed")
    if module is not None and module.is_available() and module.is_initialized():
        rank, world = module.get_rank(), module.get_world_size()
        local = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", world))
        return Place(rank, world, *local)
    try:
        world = int(environment.get("WORLD_SIZE", 1))
        if world == 1:
            return Place()
        rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        return Place(rank, world, local_rank, int(environment.get("LOCAL_WORLD_SIZE", world)))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"variables of torchrun are incomplete: {error}", hint="start with torchrun"
        ) from None
