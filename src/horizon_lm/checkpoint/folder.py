"""The run folder: its files, its lock and its checkpoints.

config.resolved.yaml    every setting of the run; also marks a folder as a run of ours
metrics.jsonl           see `report.metrics`
model/                  the trained model and its tokenizer, in Hugging Face format
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
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.errors import CheckpointError, ConfigError, DoesNotFitError
from horizon_lm.io import files
from horizon_lm.words import count, size

_NAME = re.compile(r"checkpoint-[0-9]+(-[0-9]+)?")
_LEFTOVER = re.compile(r"\.(tmp|del)-checkpoint-[0-9]+(-[0-9]+)?")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest is right; its files have the sizes that it lists, their content is unread."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Rejected:
    """A folder that has the name of a checkpoint and is none, and why."""

    path: Path
    reason: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError unless manifest and sizes are right."""
    try:
        return _opened(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _opened(path: Path) -> Checkpoint:
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link", hint="name the folder itself")
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}", hint="name a checkpoint or a run folder")
    found = manifest.read(path)
    for name, (num_bytes, _) in found.files.items():
        file = path / name
        if file.is_symlink() or file.parent.is_symlink():
            raise CheckpointError(f"{file}: is a link")
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(
                f"{file}: has {count(file.stat().st_size, 'byte')} instead of {num_bytes:,}"
            )
    return Checkpoint(path, found)


def is_name(name: str) -> bool:
    """Whether a folder of this name is, or was, a checkpoint."""
    return bool(_NAME.fullmatch(name))


def list_checkpoints(run: Path) -> tuple[list[Checkpoint], list[Rejected]]:
    """The checkpoints of a run, latest first by what their manifests say, and the folders that are none."""
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
    """What can be resumed from `place`, best first: the checkpoint that it is, or those of the run folder.

    Raises CheckpointError (exit code 5) where there is none; what was skipped is named.
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
        return CheckpointError(f"{place} holds no checkpoint", hint="name a run folder or a checkpoint")
    return CheckpointError(
        f"no valid checkpoint in {place}: " + "; ".join(reasons),
        hint="nothing was deleted; restore one of them, or start a new run in another output_dir",
    )


def free_name(run: Path, step: int, serial: int) -> Path:
    """Where the checkpoint of a step goes; one that went back over the same steps has another name."""
    plain = run / f"checkpoint-{step}"
    return run / f"checkpoint-{step}-{serial}" if plain.exists() or plain.is_symlink() else plain


def sweep(run: Path, disk: Disk) -> None:
    """Remove what killed runs left half written or half removed. Only with the run's lock held."""
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
            disk.rename(checkpoint.path, doomed)  # no checkpoint any more, however long removing takes
        except OSError:
            continue
        disk.remove(doomed)
        gone.append(checkpoint.path)
    return gone


def remove_all(run: Path, disk: Disk) -> None:
    """Remove the checkpoints of an earlier run that is being replaced."""
    for path in list(run.iterdir()):
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            doomed = run / f".del-{path.name}"
            disk.rename(path, doomed)
            disk.remove(doomed)


# The folder itself.


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
            remove_all(self.path, Disk())
            self.write_settings(settings)

    def write_settings(self, settings: str) -> None:
        """Put the resolved settings (YAML) in place: whole, or as they were."""
        with writing(self.path):
            files.write_file(self.settings, settings)

    def check_goes_on(self) -> None:
        """Raises ConfigError for a link where a run that goes on appends to what is there, and for a `model`
        that could not be replaced in the end."""
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


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder to write a model to; what is there already is replaced as a whole. A link is replaced too:
    what it points to stays as it is.

    Raises ConfigError for a file, and for a folder with anything in it but a model.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"a {type(folder).__name__} is not a folder", hint="pass a path")
    path = Path(os.path.abspath(Path(folder).expanduser()))
    if path.is_symlink():
        return path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", hint="choose another folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} holds something other than a model, and saving replaces the whole folder",
            hint=f"choose a new folder, as in {path / 'model'}",
        )
    return path
