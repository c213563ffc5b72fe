"""Errors of torch and Python for a lack of memory, as errors that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.memory.ways import next_smaller


@contextmanager
def memory_faults(config: TrainConfig) -> Iterator[None]:
    """Turn what torch and Python raise when memory runs out into DoesNotFitError. Nothing is lost by it: a
    step that fails leaves the last checkpoint as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise explained(error, config) from error


def explained(error: BaseException, config: TrainConfig) -> BaseException:
    """Return DoesNotFitError for a lack of memory, other errors as they are."""
    if isinstance(error, torch.OutOfMemoryError):
        run = RunFolder(Path(config.output_dir).expanduser())
        hint = f"next smaller: {next_smaller(config)}"
        if run.path.is_dir() and run.has_checkpoints:
            hint += f"; horizon resume {run.path} goes on from the last checkpoint with it"
        return DoesNotFitError(f"the device is out of memory: {str(error).splitlines()[0]}", hint=hint)
    if isinstance(error, MemoryError):
        return DoesNotFitError(
            "the host is out of memory", hint="free memory, or read less (max_train_bytes)"
        )
    return error
