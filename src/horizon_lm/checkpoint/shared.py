"""Check that all ranks see the same folder: a checkpoint of several ranks is one folder."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from horizon_lm.checkpoint.disk import Disk
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import ConfigError

_PATIENCE_SECONDS = 30.0  # until other nodes must see a new file: network file systems remember old lists


def shared_folder(ranks: Ranks, path: Path) -> None:
    """Raise ConfigError on all ranks unless each sees a file that rank 0 makes in the folder. Collective."""
    if ranks.world == 1:
        return
    name = f".horizon-{secrets.token_hex(8)}.tmp"  # `files.STAGED`: swept if a kill leaves it
    problem = _made(path / name) if ranks.is_first else None
    name, problem = ranks.from_first([name, problem])
    try:
        is_seen = problem is None and (ranks.is_first or _is_seen(path / name))
        node = socket.gethostname()
        told = ranks.exchange([node, is_seen])
    finally:
        if ranks.is_first:
            with suppress(OSError):
                (path / name).unlink(missing_ok=True)
    if problem is not None:
        raise _on_all(f"rank 0 cannot write to {path}: {problem}", "choose another output_dir")
    blind = [rank for rank, (_, seen) in enumerate(told) if not seen]
    if blind:
        nodes = ", ".join(sorted({told[rank][0] for rank in blind}))
        raise _on_all(
            f"rank {blind[0]} does not see what rank 0 on {told[0][0]} writes to {path}: "
            f"it is another folder on {nodes}",
            "set output_dir to a folder on a file system that all nodes share",
        )


def _on_all(message: str, hint: str) -> ConfigError:
    error = ConfigError(message, hint=hint)
    error.is_shared = True
    return error


def _made(path: Path) -> str | None:
    """Create an empty file; say why that failed."""
    try:
        os.close(Disk().create(path))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_seen(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.05)
    return True
