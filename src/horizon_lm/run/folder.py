"""The run folder: what lies in it, who may use it, and how it stays whole.

config.resolved.yaml    every setting of the run; also the mark that a folder is a run of ours
metrics.jsonl           see `metrics`
model/                  the trained model and its tokenizer, in Hugging Face format
loss.png                the loss curve
tensorboard/            where report_to names it
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DoesNotFitError

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
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def results(self) -> tuple[Path, ...]:
        return self.settings, self.metrics, self.model, self.picture, self.tensorboard

    def begin(self, settings: str) -> None:
        """Make it this run's folder: an earlier run's results go, `settings` (YAML) is written."""
        with writing(self.path):
            for folder in (self.model, self.tensorboard):
                if folder.exists():
                    shutil.rmtree(folder)
            for path in (self.picture, self.metrics):
                path.unlink(missing_ok=True)
            staging = self.settings.with_name(f".{self.settings.name}.tmp")
            try:
                staging.write_text(settings, encoding="utf-8")
                os.replace(staging, self.settings)
            finally:
                staging.unlink(missing_ok=True)


@contextmanager
def claim(output_dir: str, *, overwrite: bool) -> Iterator[RunFolder]:
    """A folder for a run: created where there is none, and removed again if nothing came to lie in it.

    A folder that holds anything is refused with ConfigError. `overwrite` allows an earlier run
    of ours, and a foreign folder as long as nothing in it would be replaced.
    """
    folder = RunFolder(Path(output_dir).expanduser())
    _check_free(folder, overwrite)
    created = _missing(folder.path)
    try:
        with writing(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir={output_dir!r} is not writable", hint="choose another output_dir")
        yield folder
    finally:
        for path in created:  # leaf first; a folder with something in it stays, and so do its parents
            try:
                path.rmdir()
            except OSError:
                break


def _check_free(folder: RunFolder, overwrite: bool) -> None:
    path = folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir={str(path)!r} is a file", hint="choose another output_dir")
    if not path.is_dir() or not any(path.iterdir()):
        return
    is_ours = folder.settings.is_file()
    if not overwrite:
        what = "holds an earlier run" if is_ours else "is not empty and holds no run of ours"
        way = "output_dir=FOLDER, or overwrite_output_dir=true" + (" to replace that run" if is_ours else "")
        raise ConfigError(f"output_dir={str(path)!r} {what}", hint=way)
    clashes = [result.name for result in folder.results if result.exists()]
    if clashes and not is_ours:
        raise ConfigError(
            f"output_dir={str(path)!r} holds no run of ours, yet {', '.join(clashes)}, which a run replaces",
            hint="choose another output_dir",
        )


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


def check_disk(folder: RunFolder, num_bytes: int) -> None:
    """Raises DoesNotFitError where the disk has no room for an export of `num_bytes` and a tenth more."""
    needed, free = num_bytes * 1.1, shutil.disk_usage(folder.path).free
    if needed > free:
        raise DoesNotFitError(
            f"the trained model needs {needed / 1e9:.2f} GB of disk space, but {folder.path} has "
            f"{free / 1e9:.2f} GB",
            hint="free disk space, choose another output_dir, or save_dtype: bfloat16",
        )
