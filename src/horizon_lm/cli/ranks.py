"""Commands started as several ranks (torchrun, srun): which of them use all, and which rank speaks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from horizon_lm.errors import ConfigError, HorizonError

# Variables that a launcher of several ranks sets; without them nothing of torch is imported.
_LAUNCHERS = ("WORLD_SIZE", "SLURM_NTASKS")
_TOGETHER = ("train", "resume", "eval")
_ALONE = {"bench": "it measures one process on one device", "chat": "it reads standard input"}


class Place(NamedTuple):
    """The number of this process and of all, and its number among those of its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def place() -> Place:
    """Find this process among the ranks of a run. Raises ConfigError for incomplete variables."""
    if not any(name in os.environ for name in _LAUNCHERS):
        return Place()
    # Or torch prints stacks of C++ for each connection to a rank that was lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from horizon_lm.distributed import start

    found = start.place()
    return Place(found.rank, found.world, found.local_rank)


def has_work(arguments: Sequence[str], here: Place) -> bool:
    """Tell whether this rank takes part in a command. Most are done by rank 0 alone.

    Raises ConfigError, which rank 0 reports, for a command that makes no sense on several ranks.
    """
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    asks = {"-h", "--help"} & set(arguments)
    if here.world > 1 and verb in _ALONE and not asks:
        error = ConfigError(
            f"horizon {verb} was started as {here.world} ranks, and {_ALONE[verb]}",
            hint=f"run horizon {verb} by itself, without torchrun or srun",
        )
        error.is_shared = True
        raise error
    return here.rank == 0 or verb in _TOGETHER and not asks and "--dry-run" not in arguments


def speaks(error: HorizonError, here: Place) -> bool:
    """Tell whether this rank reports an error: rank 0 each one, others their own.

    Before the ranks are connected, those of a node read the same settings, so the first of them speaks.
    """
    if here.rank == 0 or error.is_own:
        return True
    return not error.is_shared and here.local_rank == 0
