"""The checkpoints of a run folder: which there are, which is the latest, which may go.

checkpoint-STEP/        a checkpoint: manifest.json and the files that it lists
.tmp-checkpoint-STEP/   one that was being written when the run was killed; swept
.del-checkpoint-STEP/   one that was being removed; swept
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from horizon_lm.checkpoint import manifest
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.errors import CheckpointError
from horizon_lm.words import count

_NAME = re.compile(r"checkpoint-[0-9]+(-[0-9]+)?")
_LEFTOVER = re.compile(r"\.(tmp|del)-checkpoint-[0-9]+(-[0-9]+)?")


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
    for name, (size, _) in found.files.items():
        file = path / name
        if file.is_symlink() or file.parent.is_symlink():
            raise CheckpointError(f"{file}: is a link")
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: has {count(file.stat().st_size, 'byte')} instead of {size:,}")
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

    Raises CheckpointError (exit code 5) where there is none; what was passed over is named.
    """
    if (place / manifest.NAME).exists() or _NAME.fullmatch(place.name):
        return [open_checkpoint(place)]
    found, rejected = list_checkpoints(place)
    for one in rejected:
        warn(f"passed over {one.reason}")
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


def prune(
    run: Path,
    disk: Disk,
    *,
    keep_last: int | None,
    keep_every: int | None,
    keep: frozenset[str] = frozenset(),
) -> list[Path]:
    """Remove all but the `keep_last` latest, those whose step is a multiple of `keep_every`, and those named
    in `keep`.

    What is no valid checkpoint is left alone: somebody may want to look at it.
    """
    found, _ = list_checkpoints(run)
    gone = []
    for checkpoint in found[keep_last:] if keep_last is not None else []:
        if keep_every is not None and checkpoint.manifest.step % keep_every == 0:
            continue
        if checkpoint.path.name in keep:
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
