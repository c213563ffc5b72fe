"""The run folder: what lies in it, who may use it, and how it stays whole.

config.resolved.yaml    every setting of the run; also the mark that a folder is a run of ours
metrics.jsonl           see `metrics`
model/                  the trained model and its tokenizer, in Hugging Face format
loss.png                the loss curve
report.html, trace.json what `horizon report` made of metrics.jsonl
tensorboard/, wandb/    where report_to names them
checkpoint-STEP/        see `checkpoint.folder`

One process uses it at a time: it holds a lock on the folder itself, which ends with the process. Nothing is
written through a link that lies in it (see `files`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.io import files
from horizon_lm.words import size

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "config.resolved.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def has_checkpoints(self) -> bool:
        return bool(checkpoints.list_checkpoints(self.path)[0])

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def results(self) -> tuple[Path, ...]:
        return (
            *(self.settings, self.metrics, self.model, self.picture, self.tensorboard),
            *(self.report, self.trace),
        )

    @property
    def is_in_use(self) -> bool:
        """Whether a run holds the folder's lock at this moment."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks on folders
            return False
        finally:
            os.close(file)
        return False

    def begin(self, settings: str) -> None:
        """Make it this run's folder: an earlier run's results go, `settings` (YAML) is written."""
        with writing(self.path):
            for path in self.results:
                if path != self.settings:
                    files.remove(path)
            checkpoints.remove_all(self.path, Disk())
            self.write_settings(settings)

    def write_settings(self, settings: str) -> None:
        """Put the resolved settings (YAML) in place: whole, or as they were."""
        with writing(self.path):
            files.write_file(self.settings, settings)

    def check_goes_on(self) -> None:
        """Raises ConfigError for a link where a run that goes on appends to what is there, and for a `model`
        that could not be replaced in the end."""
        from horizon_lm.checkpoint.export import check_target  # with torch

        for path in (self.metrics, self.tensorboard, self.wandb):
            files.check_own(path)
        check_target(self.model)

    def sweep(self) -> None:
        """Remove what runs of earlier versions left of files that they were writing when they were killed;
        only with the folder's lock held. Those of this version go with the next file that is written."""
        for path in (self.settings, self.picture, self.report, self.trace):
            path.with_name(_earlier(path)).unlink(missing_ok=True)


@contextmanager
def claim(output_dir: str, *, overwrite: bool, resume: bool = False) -> Iterator[RunFolder]:
    """A folder for a run: created where there is none, and removed again if nothing came to lie in it.

    A folder that holds anything is refused with ConfigError, and so is one that another process uses.
    `overwrite` allows an earlier run of ours, and a foreign folder as long as nothing in it would be
    replaced; `resume` allows a run of ours.
    """
    folder = RunFolder(Path(output_dir).expanduser())
    _check_free(folder, overwrite or resume and folder.settings.is_file())
    created = _missing(folder.path)
    try:
        with writing(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir={output_dir!r} is not writable", hint="choose another output_dir")
        with _locked(folder.path):
            folder.sweep()
            if resume:
                folder.check_goes_on()
            yield folder
    finally:
        for path in created:  # leaf first; a folder with something in it stays, and so do its parents
            try:
                path.rmdir()
            except OSError:
                break


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ConfigError where another process holds it."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir={str(path)!r} is in use by another run",
                hint="wait for it, or choose another output_dir",
            ) from None
        except OSError:  # a file system without locks on folders, as some networks have
            pass
        yield
    finally:
        os.close(file)


def _check_free(folder: RunFolder, overwrite: bool) -> None:
    path = folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir={str(path)!r} is a file", hint="choose another output_dir")
    # A run that was killed as it put its first file in place leaves the staging of that.
    staged = (_earlier(folder.settings),)
    if not path.is_dir() or all(e.name in staged or files.STAGED.fullmatch(e.name) for e in path.iterdir()):
        return
    is_ours = folder.settings.is_file()
    if not overwrite:
        what = "holds an earlier run" if is_ours else "is not empty and holds no run of ours"
        way = "output_dir=FOLDER, or overwrite_output_dir=true" + (" to replace that run" if is_ours else "")
        raise ConfigError(f"output_dir={str(path)!r} {what}", hint=way)
    clashes = [result.name for result in folder.results if os.path.lexists(result)]
    if clashes and not is_ours:
        raise ConfigError(
            f"output_dir={str(path)!r} holds no run of ours, yet {', '.join(clashes)}, which a run replaces",
            hint="choose another output_dir",
        )


def _earlier(path: Path) -> str:
    """What earlier versions called a file while they wrote it."""
    return f".{path.name}.tmp"


def _missing(path: Path) -> list[Path]:
    """Of `path` and its parents those that do not exist, the deepest first."""
    return [p for p in (path, *path.parents) if not p.exists()]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into DoesNotFitError (the disk is full) or ConfigError (the place is not usable)."""
    try:
        yield
    except OSError as error:
        reason = f"writing {path} failed: {error.strerror or error}"
        if error.errno in _NO_ROOM:
            raise DoesNotFitError(reason, hint="free disk space or choose another output_dir") from error
        raise ConfigError(reason, hint="choose another output_dir") from error


def check_disk(folder: RunFolder, num_bytes: int, checkpoint_bytes: int = 0) -> None:
    """Raises DoesNotFitError where the disk has no room for an export of `num_bytes`, a checkpoint beside
    it, and a tenth more."""
    needed, free = (num_bytes + checkpoint_bytes) * 1.1, shutil.disk_usage(folder.path).free
    if needed > free:
        what = "the trained model and a checkpoint need" if checkpoint_bytes else "the trained model needs"
        ways = "free disk space, choose another output_dir, or save_dtype: bfloat16"
        raise DoesNotFitError(
            f"{what} {size(needed)} of disk space, but {folder.path} has {size(free)}",
            hint=ways + (", or save_strategy: no" if checkpoint_bytes else ""),
        )
