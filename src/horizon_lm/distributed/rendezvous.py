"""Rendezvous: the store through which ranks find each other.

`horizon_lm.distributed.start` imports this module only for more than one rank.
"""

from __future__ import annotations

import time
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from horizon_lm.distributed.launch import Launch
from horizon_lm.distributed.ranks import Place
from horizon_lm.errors import ConfigError, RankError

_POLL_SECONDS = 0.05


@cache
def connect(launch: Launch, seconds: float) -> Any:
    """Return the store at a launch's address. Rank 0 serves it until its process ends, unless the launcher
    does.

    seconds: to wait for it. Raises ConfigError if the address or the port cannot be used.
    """
    serves = launch.place.rank == 0 and not launch.is_served
    try:
        store = dist.TCPStore(
            launch.address,
            launch.port,
            launch.place.world,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (dist.DistError, ValueError) as error:
        place = f"{launch.address}:{launch.port}"
        if serves:
            message, hint = f"cannot listen on {place}", "set another MASTER_PORT, or end what listens there"
        else:
            message = f"cannot connect to rank 0 at {place} within {seconds:g} s"
            hint = "check that rank 0 has started and that MASTER_ADDR and MASTER_PORT can be reached"
        raise ConfigError(f"{message}: {error!s:.200}", hint=hint) from error
    return dist.PrefixStore(f"attempt-{launch.attempt}", store)


def gather(store: Any, place: Place, seconds: float) -> None:
    """Wait until all ranks are here. Raises RankError with the numbers of those that are not in time."""
    if store.add(f"here/{place.rank}", 1) > 1:
        raise ConfigError(
            f"two processes are rank {place.rank} of {place.world}",
            hint="give each process its own RANK, and each run its own MASTER_PORT",
        )
    try:
        _await_all(store, place, seconds)
    except dist.DistError as error:
        raise RankError(
            "rank 0 ended before all ranks had started", hint="see the output of rank 0"
        ) from error


def _await_all(store: Any, place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    missing = list(range(place.world))
    while missing:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if missing and time.monotonic() > deadline:
            numbers = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            raise RankError(
                f"{len(missing)} of {place.world} ranks did not start within {seconds:g} s: {numbers}",
                hint="see the launcher's output on their nodes",
            )
        if missing:
            time.sleep(_POLL_SECONDS)
