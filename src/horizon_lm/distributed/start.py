"""Start: connect this process to the other ranks of its run, and leave them in the end."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from horizon_lm.distributed.launch import Launch, find, place_of
from horizon_lm.distributed.ranks import ALONE, Channel, Place, Ranks
from horizon_lm.errors import ConfigError
from horizon_lm.machine.cores import affinity
from horizon_lm.machine.device import resolve_device

if TYPE_CHECKING:
    from horizon_lm.distributed.torch_ranks import TorchRanks
    from horizon_lm.distributed.watch import Watch

_START_SECONDS = 600.0  # until all ranks have started
# Of collectives: heartbeats find lost ranks, and one rank may work alone for long. NCCL's ends ranks that are
# alive, each at another collective.
_TIMEOUT, _NCCL_TIMEOUT = timedelta(hours=12), timedelta(minutes=30)


class _Session:
    """Connections of this process, and their watch. is_ours: the default process group was made here."""

    def __init__(self, place: Place, watch: Watch, is_ours: bool) -> None:
        import torch.distributed as dist

        self.place, self.watch, self.is_ours = place, watch, is_ours
        self.group = dist.group.WORLD
        self.channels = {channel: dist.new_group(backend="gloo", timeout=_TIMEOUT) for channel in Channel}
        self.ranks: dict[str, TorchRanks] = {}  # by kind of device

    def of(self, device: str) -> Ranks:
        """Return the ranks on devices of a setting. Collective the first time for each kind."""
        import torch.distributed as dist

        from horizon_lm.distributed.torch_ranks import TorchRanks

        kind = (
            ("cuda" if torch.cuda.is_available() else "cpu")
            if device == "auto"
            else torch.device(device).type
        )
        if kind not in self.ranks:
            main = TorchRanks(self.place, self.channels[Channel.MAIN], self.channels, self.watch)
            place = _settle(main, device)
            if kind == "cuda":
                torch.cuda.set_device(resolve_device(device, place.local_rank))
                group = dist.new_group(backend="nccl", timeout=_NCCL_TIMEOUT)
            else:
                group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            self.ranks[kind] = TorchRanks(place, group, self.channels, self.watch)
        return self.ranks[kind]


_session: _Session | None = None
_sessions = 0  # of this process so far


def place() -> Place:
    """Return this process's place, without connecting it. Raises ConfigError for incomplete variables."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    return place_of(os.environ)


def join(device: str) -> Ranks:
    """Return the ranks of this run; ALONE if there is one.

    device: setting `device`. Uses the default process group if there is one, else makes it from the variables
    of torchrun or srun. Collective the first time; later calls return the same ranks. Raises ConfigError for
    variables and devices that do not fit together, and RankError if not all ranks start.
    """
    global _session, _sessions
    here = place()
    if here.world == 1:
        return ALONE
    if _session is None or _session.group is not torch.distributed.group.WORLD:
        _sessions += 1
        _session = _connected(here)
        if _sessions == 1:
            atexit.register(_end)
    return _session.of(device)


def leave() -> None:
    """End the connections, once all ranks are here. Collective; does nothing for a rank alone."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    dist, main = torch.distributed, session.channels[Channel.MAIN]
    dist.barrier(group=main)
    session.watch.stop()
    dist.barrier(group=main)  # the store may go once nobody reads it
    groups = [torch.distributed.group.WORLD] if session.is_ours else [*session.channels.values()]
    for group in groups:
        dist.destroy_process_group(group)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the ranks; leave them in the end, or tell them the error that ended this one."""
    ranks = join(device)
    try:
        yield ranks
    except BaseException as error:
        if _session is not None:
            _session.watch.tell(error)
            if not _session.watch.is_failed:
                _session.watch.leave()  # all ranks raise this one
        raise
    leave()


def _connected(here: Place) -> _Session:
    """Connect to all ranks: first to the store, so that the watch covers all that follows."""
    import torch.distributed as dist

    from horizon_lm.distributed import rendezvous
    from horizon_lm.distributed.watch import TIMES, Watch

    store: Any
    is_ours = not dist.is_initialized()
    if is_ours:
        launch = find(os.environ)
        store = dist.PrefixStore(f"group-{_sessions}", rendezvous.connect(launch, _START_SECONDS))
    else:
        launch = Launch(is_served=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        store = dist.distributed_c10d._get_default_store()
    own: Any = dist.PrefixStore(f"horizon-{_sessions}", store)
    watch = Watch(own.clone(), here, is_host=not launch.is_served, times=TIMES)
    watch.greet()
    rendezvous.gather(own, here, _START_SECONDS)
    watch.start()
    if is_ours:
        dist.init_process_group("gloo", store=store, rank=here.rank, world_size=here.world, timeout=_TIMEOUT)
    return _Session(here, watch, is_ours)


def _settle(ranks: TorchRanks, device: str) -> Place:
    """Return the place among the ranks of this machine, once all have a device that fits. Collective."""
    told = ranks.exchange([socket.gethostname(), sum(1 << core for core in affinity())])
    hosts, cores = [host for host, _ in told], told[ranks.rank][1]
    peers = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    sharers = sum(bool(told[rank][1] & cores) for rank in peers)  # srun gives each task cores of its own
    found = Place(ranks.rank, ranks.world, peers.index(ranks.rank), len(peers), sharers)
    own = {"name": "", "gpu": "", "error": "", "hint": None}
    try:
        resolved = resolve_device(device, found.local_rank)
        own["name"] = str(resolved)
        if resolved.type == "cuda":
            own["gpu"] = str(torch.cuda.get_device_properties(resolved).uuid)
    except ConfigError as error:
        own |= {"error": error.message, "hint": error.hint}
    problem = device_problem(hosts, ranks.exchange(own))
    if problem is not None:
        problem.is_shared = True
        raise problem
    return found


def device_problem(hosts: list[str], devices: list[dict[str, Any]]) -> ConfigError | None:
    """Return the error of the devices that ranks resolved, the same on all.

    devices: of each rank its name, the GPU's UUID, or the error and its hint.
    """
    takers: dict[str, int] = {}
    for rank, (host, one) in enumerate(zip(hosts, devices, strict=True)):
        if one["error"]:
            return ConfigError(f"rank {rank} on {host}: {one['error']}", hint=one["hint"])
        kind, first = (value["name"].partition(":")[0] for value in (one, devices[0]))
        if kind != first:
            return ConfigError(
                f"rank {rank} on {host} uses {one['name']}, rank 0 on {hosts[0]} {devices[0]['name']}",
                hint="set device=cuda or device=cpu for all ranks",
            )
        other = takers.setdefault(one["gpu"] or f"rank {rank}", rank)
        if other != rank:
            return ConfigError(
                f"ranks {other} and {rank} on {host} use the same GPU, {one['name']} ({one['gpu']})",
                hint="start one rank per GPU; each must see its own or all of CUDA_VISIBLE_DEVICES",
            )
    return None


def _end() -> None:
    """At the end of a process that did not leave: tell the others how it ended."""
    session = _session
    if session is None:
        return
    error = getattr(sys, "last_value", None)
    with suppress(Exception):
        if isinstance(error, BaseException):
            session.watch.tell(error)
        session.watch.leave()
