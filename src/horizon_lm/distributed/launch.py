"""What launchers tell a process by its environment: its number among the ranks, and where they gather.

torchrun, `accelerate launch` and Ray Train set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
srun sets variables of its own: the address is that of the first node, the port follows from the job's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from horizon_lm.distributed.ranks import Place
from horizon_lm.errors import ConfigError

# Ports that a job of Slurm may get: above those of services, below those that systems give to clients.
_PORTS = range(15_000, 30_000)


class Launch(NamedTuple):
    """The place of this process, and the address and port at which rank 0 listens.

    is_served: a launcher listens there (torchrun), instead of rank 0. attempt: its restarts so far.
    """

    place: Place = Place()
    address: str = ""
    port: int = 0
    is_served: bool = False
    attempt: int = 0


def find(environment: Mapping[str, str]) -> Launch:
    """Return how this process was started; one rank alone if nothing says otherwise.

    Raises ConfigError for variables that are incomplete or contradict each other.
    """
    if "WORLD_SIZE" in environment:
        return _torchrun(environment)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:  # a batch script has no step
        return _srun(environment)
    return Launch()


def _torchrun(environment: Mapping[str, str]) -> Launch:
    hint = "start with torchrun, or unset WORLD_SIZE for one process"
    world = _number(environment, "WORLD_SIZE", hint)
    if world == 1:
        return Launch()
    local_rank = _number(environment, "LOCAL_RANK", hint)
    local_world = _number(environment, "LOCAL_WORLD_SIZE", hint, default=max(1, local_rank + 1))
    place = _checked(Place(_number(environment, "RANK", hint), world, local_rank, local_world), hint)
    return Launch(
        place,
        _text(environment, "MASTER_ADDR", hint),
        _number(environment, "MASTER_PORT", hint),
        is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", hint, default=0),
    )


def _srun(environment: Mapping[str, str]) -> Launch:
    hint = "start with srun, or unset SLURM_PROCID for one process"
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world = _number(environment, name, hint)
    if world == 1:
        return Launch()
    local_rank = _number(environment, "SLURM_LOCALID", hint)
    local_world = _number(environment, "SLURM_NTASKS_PER_NODE", hint, default=local_rank + 1)
    place = Place(
        _number(environment, "SLURM_PROCID", hint), world, local_rank, max(local_world, local_rank + 1)
    )
    address = environment.get("MASTER_ADDR") or _first_node(environment, hint)
    job = _number(environment, "SLURM_JOB_ID", hint, default=0) + _number(environment, "SLURM_STEP_ID", hint)
    port = _number(environment, "MASTER_PORT", hint, default=_PORTS[job % len(_PORTS)])
    return Launch(_checked(place, hint), address, port)


def _first_node(environment: Mapping[str, str], hint: str) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return first_node(environment[name])
    raise ConfigError("srun: neither MASTER_ADDR nor SLURM_STEP_NODELIST is set", hint=hint)


def first_node(nodes: str) -> str:
    """Return the first node of a list as Slurm writes it: `gpu[003-007,12],login1` gives gpu003."""
    first = re.fullmatch(r"([^,\[\]]*(?:\[[^\]]+\][^,\[\]]*)*)(?:,.*)?", nodes.strip())
    name = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[1]) if first else ""
    if not re.fullmatch(r"[\w.:-]+", name):
        raise ConfigError(
            f"cannot read the list of nodes {nodes!r}", hint="set MASTER_ADDR=NAME of the first node"
        )
    return name


def _checked(place: Place, hint: str) -> Place:
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world):
        raise ConfigError(
            f"rank {place.rank} of {place.world}, and {place.local_rank} of {place.local_world} on its node: "
            "the variables of the launcher contradict each other",
            hint=hint,
        )
    return place


def _text(environment: Mapping[str, str], name: str, hint: str) -> str:
    value = environment.get(name, "")
    if not value:
        started = next(key for key in ("WORLD_SIZE", "SLURM_PROCID") if key in environment)
        raise ConfigError(f"{started}={environment[started]}, but {name} is not set", hint=hint)
    return value


def _number(environment: Mapping[str, str], name: str, hint: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    value = _text(environment, name, hint)
    if not re.fullmatch(r"\d{1,18}", value):
        raise ConfigError(f"{name}={value!r} is not a number", hint=hint)
    return int(value)
