"""Restarts by torchrun: a run that its launcher starts again resumes by itself.

torchrun counts restarts in TORCHELASTIC_RESTART_COUNT. An earlier run in output_dir is not resumed by
mistake: the first line of metrics.jsonl names the launchers of a run, and one of them must be one of now.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import xxhash

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DataError
from horizon_lm.report.metrics import read_lines
from horizon_lm.training.run_settings import AUTO
from horizon_lm.training.together import Together


def count_of(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often torchrun has restarted this process."""
    text = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Identify the torchrun that started this process, the same after a restart; None without one."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    parent = os.getppid()
    with suppress(psutil.Error):
        born = psutil.Process(parent).create_time()
        return str(xxhash.xxh3_64_hexdigest(f"{socket.gethostname()} {parent} {born}".encode()))
    return None


def resumed(config: TrainConfig, together: Together) -> tuple[TrainConfig, list[str], bool]:
    """Return the settings, the launchers of all ranks, and whether output_dir holds this run.

    After a restart resume_from_checkpoint becomes `auto`, unless the run died before its first checkpoint.
    """
    launchers = sorted({one for one in together.exchange("launchers", launcher()) if one is not None})
    folder = RunFolder(Path(config.output_dir).expanduser())
    is_own, has_checkpoint = together.first("restarts", lambda: _look(folder, launchers))
    if has_checkpoint:
        config = config.replace(resume_from_checkpoint=AUTO)
    return config, launchers, is_own


def _look(folder: RunFolder, launchers: Sequence[str]) -> tuple[bool, bool]:
    """Tell whether the folder's run was started by one of the launchers, and whether it has a checkpoint."""
    if count_of() == 0 or not set(launchers) & set(_launched_by(folder)):
        return False, False
    found, rejected = checkpoints.list_checkpoints(folder.path)
    return True, bool(found or rejected)


def _launched_by(folder: RunFolder) -> list[str]:
    """Return the launchers of the latest session of a run; none if they cannot be read."""
    found: list[str] = []
    with suppress(OSError, DataError):
        for line in read_lines(folder.metrics):
            if line.get("event") == "start":
                found = [str(one) for one in line.get("launched_by") or ()]
    return found
