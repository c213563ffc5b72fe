"""Commands started as several ranks (torchrun, srun): which of them use all, and which rank speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from horizon_lm.errors import ConfigError, HorizonError

# Variables that a launcher of several ranks sets; without them nothing of torch is imported.
_LAUNCHERS = ("WORLD_SIZE", "SLURM_NTASKS")
_TOGETHER = ("train", "resume", "eval")
_ALONE = {
    "bench": "it measures one process on one device",
    "chat": "it reads standard input",
}


def place() -> tuple[int, int]:
    """Return (rank, number of ranks) of this process."""
    if not any(name in os.environ for name in _LAUNCHERS):
        return 0, 1
    from horizon_lm.distributed import start

    found = start._place(os.environ)
    return found.rank, found.world


def has_work(arguments: Sequence[str], rank: int, world: int) -> bool:
    """Tell whether this rank takes part in a command. Most are done by rank 0 alone.

    Raises ConfigError on rank 0 for a command that several ranks would disturb.
    """
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    wants_all = verb in _TOGETHER and not {"-h", "--help", "--dry-run"} & set(arguments)
    if world > 1 and rank == 0 and verb in _ALONE:
        raise ConfigError(
            f"horizon {verb} was started as {world} ranks, and {_ALONE[verb]}",
            hint=f"run horizon {verb} by itself, without torchrun or srun",
        )
    return rank == 0 or wants_all


@contextmanager
def silent(is_silent: bool) -> Iterator[None]:
    """Discard what is printed, if `is_silent`."""
    if not is_silent:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null), redirect_stderr(null):
        yield


def speaks(error: HorizonError, rank: int) -> bool:
    """Tell whether this rank reports an error: its own, and on rank 0 those of all ranks."""
    return rank == 0 or not error.is_shared
