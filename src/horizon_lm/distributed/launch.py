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
_TORCHRUN = "start with torchrun, or unset WORLD_SIZE for one process"
_SRUN = "start with srun, or unset SLURM_PROCID for one process"


class Launch(NamedTuple):
    """The place of this process, and the address and port at which rank 0 listens.

    is_served: a launcher listens there (torchrun), instead of rank 0. attempt: its restarts so far.
    """

    place: Place = Place()
    address: str = ""
    port: int = 0
    is_served: bool = False
    attempt: int = 0


def place_of(environment: Mapping[str, str]) -> Place:
    """Return this process's place; one rank alone if nothing says otherwise.

    Raises ConfigError for variables that are incomplete or contradict each other.
    """
    if "WORLD_SIZE" in environment:
        world, names, hint = "WORLD_SIZE", ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), _TORCHRUN
    elif _is_srun(environment):
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        names, hint = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"), _SRUN
    else:
        return Place()
    number = _number(environment, world, hint)
    if number == 1:
        return Place()
    rank, local_rank = (_number(environment, name, hint) for name in names[:2])
    local_world = _number(environment, names[2], hint, default=local_rank + 1)
    if not (rank < number and local_rank < min(local_world, number)):
        raise ConfigError(
            f"rank {rank} of {number}, and {local_rank} of {local_world} on its node: the variables of the "
            "launcher contradict each other",
            hint=hint,
        )
    return Place(rank, number, local_rank, min(local_world, number))


def find(environment: Mapping[str, str]) -> Launch:
    """Return how this process was started, and where the ranks gather. Raises ConfigError as `place_of`."""
    place = place_of(environment)
    if place.world == 1:
        return Launch()
    if "WORLD_SIZE" not in environment:
        return _srun(environment, place)
    return Launch(
        place,
        _text(environment, "MASTER_ADDR", _TORCHRUN),
        _number(environment, "MASTER_PORT", _TORCHRUN),
        is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", _TORCHRUN, default=0),
    )


def _is_srun(environment: Mapping[str, str]) -> bool:
    """Tell whether srun started this process. A batch script has a number too, but no step."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment


def _srun(environment: Mapping[str, str], place: Place) -> Launch:
    address = environment.get("MASTER_ADDR") or _first_node(environment)
    numbers = (_number(environment, name, _SRUN, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _number(environment, "MASTER_PORT", _SRUN, default=_PORTS[sum(numbers) % len(_PORTS)])
    return Launch(place, address, port)


def _first_node(environment: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return first_node(environment[name])
    raise ConfigError("srun: neither MASTER_ADDR nor SLURM_STEP_NODELIST is set", hint=_SRUN)


def first_node(nodes: str) -> str:
    """Return the first node of a list as Slurm writes it: `gpu[003-007,12],login1` gives gpu003."""
    first = re.fullmatch(r"([^,\[\]]*(?:\[[^\]]+\][^,\[\]]*)*)(?:,.*)?", nodes.strip())
    name = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[1]) if first else ""
    if not re.fullmatch(r"[\w.:-]+", name):
        raise ConfigError(
            f"cannot read the list of nodes {nodes!r}", hint="set MASTER_ADDR=NAME of the first node"
        )
    return name


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
