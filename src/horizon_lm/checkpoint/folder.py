"""The run folder: its files, its lock and its checkpoints.

config.resolved.yaml    every setting of the run; also marks a folder as a run of ours
metrics.jsonl           see `report.metrics`
model/                  the trained model, or the adapter alone, and its tokenizer, in Hugging Face format
loss.png                the loss curve
report.html, trace.json written by `horizon report` from metrics.jsonl
tensorboard/, wandb/    if report_to names them
checkpoint-STEP/        a checkpoint: manifest.json and the files that it lists
.tmp-checkpoint-STEP/   one that was being written when the run was killed; swept
.del-checkpoint-STEP/   one that was being removed; swept

One process uses it at a time: it holds a lock on the folder itself, which ends with the process. Nothing is
written through a link that lies in it (see `io.files`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from horizon_lm.checkpoint import manifest
from horizon_lm.checkpoint.disk import Disk, damaged
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.errors import CheckpointError, ConfigError, DoesNotFitError
from horizon_lm.io import files
from horizon_lm.words import count, size

_NAME = re.compile(r"checkpoint-[0-9]+(-[0-9]+)?")
_LEFTOVER = re.compile(r"\.(tmp|del)-checkpoint-[0-9]+(-[0-9]+)?")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a valid manifest and files of the listed sizes; their content is unread."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Rejected:
    """A folder that is named like a checkpoint and is not one, and why."""

    path: Path
    reason: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Check manifest and sizes of a checkpoint. Raises CheckpointError."""
    try:
        return _opened(path)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from None


def _opened(path: Path) -> Checkpoint:
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link", hint="pass the directory itself")
    if not path.is_dir():
        what = "not a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {what}", hint="pass a run or checkpoint directory")
    found = manifest.read(path)
    for name, (num_bytes, _) in found.files.items():
        file = path / name
        if file.is_symlink() or file.parent.is_symlink():
            raise damaged(file, "is a link")
        if not file.is_file():
            raise damaged(file, "is missing")
        if file.stat().st_size != num_bytes:
            raise damaged(file, f"has {count(file.stat().st_size, 'byte')} instead of {num_bytes:,}")
    return Checkpoint(path, found)


def is_name(name: str) -> bool:
    """Tell whether a folder of this name is, or was, a checkpoint."""
    return bool(_NAME.fullmatch(name))


def list_checkpoints(run: Path) -> tuple[list[Checkpoint], list[Rejected]]:
    """Return the checkpoints of a run, latest first by their manifests, and the invalid ones."""
    found: list[Checkpoint] = []
    rejected: list[Rejected] = []
    for path in sorted(run.iterdir()) if run.is_dir() else []:
        if _NAME.fullmatch(path.name):
            try:
                found.append(open_checkpoint(path))
            except CheckpointError as error:
                rejected.append(Rejected(path, error.message))
    return sorted(found, key=lambda c: (c.manifest.serial, c.manifest.step), reverse=True), rejected


def candidates(place: Path, warn: Callable[[str], None]) -> list[Checkpoint]:
    """Return the checkpoints to resume from, best first: the one that `place` is, or those of a run folder.

    Warns of invalid ones. Raises CheckpointError if there is no valid one.
    """
    if (place / manifest.NAME).exists() or _NAME.fullmatch(place.name):
        return [open_checkpoint(place)]
    found, rejected = list_checkpoints(place)
    for one in rejected:
        warn(f"skipped {one.reason}")
    if not found:
        raise none_valid(place, rejected)
    return found


def none_valid(place: Path, rejected: Iterable[Rejected]) -> CheckpointError:
    reasons = [one.reason for one in rejected]
    if not reasons:
        return CheckpointError(f"{place} holds no checkpoint", hint="pass a run or checkpoint directory")
    return CheckpointError(
        f"no valid checkpoint in {place}: " + "; ".join(reasons),
        hint="restore one of them (nothing was deleted), or start a new run in another output_dir",
    )


def free_name(run: Path, step: int, serial: int) -> Path:
    """Return a free path for the checkpoint of a step: after a rollback the plain name may be taken."""
    plain = run / f"checkpoint-{step}"
    return run / f"checkpoint-{step}-{serial}" if plain.exists() or plain.is_symlink() else plain


def sweep(run: Path, disk: Disk) -> None:
    """Remove what killed runs left half written or half removed. The caller holds the run's lock."""
    for path in run.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            disk.remove(path)


@dataclass(frozen=True)
class Retention:
    """Checkpoints that pruning keeps: the `last` latest (None: all), every one whose step is a multiple of
    `every`, and those in `names`."""

    last: int | None = None
    every: int | None = None
    names: frozenset[str] = frozenset()


def prune(run: Path, disk: Disk, keep: Retention) -> list[Path]:
    """Remove all checkpoints but those of `keep`. Invalid ones stay: somebody may want to look at them."""
    found, _ = list_checkpoints(run)
    gone = []
    for checkpoint in found[keep.last :] if keep.last is not None else []:
        if keep.every is not None and checkpoint.manifest.step % keep.every == 0:
            continue
        if checkpoint.path.name in keep.names:
            continue
        doomed = run / f".del-{checkpoint.path.name}"
        try:
            disk.rename(checkpoint.path, doomed)  # not a checkpoint from here on, however long removing takes
        except OSError:
            continue
        disk.remove(doomed)
        gone.append(checkpoint.path)
    return gone


def remove_all(run: Path, disk: Disk) -> None:
    """Remove the checkpoints of a run that is being replaced."""
    for path in list(run.iterdir()):
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            doomed = run / f".del-{path.name}"
            disk.rename(path, doomed)
            disk.remove(doomed)


# The folder itself.


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder."""

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
    def drawing(self) -> Path:
        return self.path / "step.svg"

    @property
    def has_checkpoints(self) -> bool:
        return bool(list_checkpoints(self.path)[0])

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
            *(self.report, self.trace, self.drawing),
        )

    @property
    def is_in_use(self) -> bool:
        """Whether a run holds the folder's lock now."""
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
        """Make it this run's folder: remove an earlier run's results, write `settings` (YAML)."""
        with writing(self.path):
            for path in self.results:
                if path != self.settings:
                    files.remove(path)
            remove_all(self.path, Disk())
            self.write_settings(settings)

    def write_settings(self, settings: str) -> None:
        """Write the resolved settings (YAML) atomically."""
        with writing(self.path):
            files.write_file(self.settings, settings)

    def check_goes_on(self) -> None:
        """Check that a resumed run can append to its files and replace `model`. Raises ConfigError."""
        for path in (self.metrics, self.tensorboard, self.wandb):
            files.check_own(path)
        check_target(self.model)

    def sweep(self) -> None:
        """Remove files that killed runs of earlier versions left half written. The caller holds the lock.

        Those of this version go with the next file that is written.
        """
        for path in (self.settings, self.picture, self.report, self.trace):
            path.with_name(_earlier(path)).unlink(missing_ok=True)


@contextmanager
def claim(output_dir: str, *, overwrite: bool, resume: bool = False) -> Iterator[RunFolder]:
    """Lock a folder for a run. It is created if missing, and removed again if it stays empty.

    Raises ConfigError for a folder that is not empty or that another process uses. `overwrite` allows an
    earlier run of ours, and any folder in which nothing would be replaced; `resume` allows a run of ours.
    """
    folder = RunFolder(Path(output_dir).expanduser())
    _check_free(folder, overwrite or resume and folder.settings.is_file())
    created = _missing(folder.path)
    try:
        with writing(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir={output_dir!r} is not writable", hint="choose another output_dir")
        with locked(folder.path):
            folder.sweep()
            if resume:
                folder.check_goes_on()
            yield folder
    finally:
        for path in created:  # leaf first; a folder that is not empty stays, and so do its parents
            try:
                path.rmdir()
            except OSError:
                break


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ConfigError if another process holds it."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir={str(path)!r} is in use by another run",
                hint="wait for it or choose another output_dir",
            ) from None
        except OSError:  # some network file systems have no locks on folders
            pass
        yield
    finally:
        os.close(file)


def _check_free(folder: RunFolder, overwrite: bool) -> None:
    path = folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir={str(path)!r} is a file", hint="choose another output_dir")
    # A run that was killed while it wrote its first file leaves a staged one.
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
    """Return the name that earlier versions gave a file while they wrote it."""
    return f".{path.name}.tmp"


def _missing(path: Path) -> list[Path]:
    """Return those of `path` and its parents that do not exist, deepest first."""
    return [p for p in (path, *path.parents) if not p.exists()]


@contextmanager
def writing(path: Path, hint: str = "choose another output_dir") -> Iterator[None]:
    """Turn an OSError into DoesNotFitError (the disk is full) or ConfigError (the path is not usable)."""
    try:
        yield
    except OSError as error:
        reason = f"writing {path} failed: {error.strerror or error}"
        if error.errno in _NO_ROOM:
            raise DoesNotFitError(reason, hint=f"free disk space or {hint}") from error
        raise ConfigError(reason, hint=hint) from error


def check_disk(folder: RunFolder, num_bytes: int, checkpoint_bytes: int = 0) -> None:
    """Raise DoesNotFitError unless the disk has room for a model of `num_bytes`, a checkpoint and a tenth
    more."""
    needed, free = (num_bytes + checkpoint_bytes) * 1.1, shutil.disk_usage(folder.path).free
    if needed > free:
        what = "the trained model and a checkpoint need" if checkpoint_bytes else "the trained model needs"
        ways = "free disk space, choose another output_dir, or save_dtype: bfloat16"
        raise DoesNotFitError(
            f"{what} {size(needed)} of disk space, but {folder.path} has {size(free)}",
            hint=ways + (", or save_strategy: no" if checkpoint_bytes else ""),
        )


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the folder to write a model to. Saving replaces the whole folder; of a link only the link.

    Raises ConfigError for a file, and for a folder that holds anything but a model.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"a {type(folder).__name__} is not a folder", hint="pass a path")
    path = Path(os.path.abspath(Path(folder).expanduser()))
    if path.is_symlink():
        return path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", hint="choose another folder")
    names = ("config.json", ADAPTER_CONFIG)
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in names):
        raise ConfigError(
            f"{path} holds something other than a model, and saving replaces the whole folder",
            hint=f"choose a new folder such as {path / 'model'}",
        )
    return path
