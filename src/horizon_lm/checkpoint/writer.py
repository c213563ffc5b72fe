"""Write a checkpoint atomically, on the disk lane.

1. Write unit files, buffers, configuration and tokenizer to .tmp-checkpoint-STEP/ and fsync them.
2. Write and fsync manifest.json (size and xxh3-128 of each file), then fsync the folders.
3. Rename to checkpoint-STEP, fsync the run folder, prune old checkpoints.

A disk error fails the checkpoint, not the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horizon_lm.checkpoint import folder, manifest, units
from horizon_lm.checkpoint.disk import Disk, HashedFile
from horizon_lm.checkpoint.folder import Retention
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.memory.store import HostStore


@dataclass(frozen=True)
class Outcome:
    """How a checkpoint ended. path: None if it failed; error: why. seconds: from the request to the end."""

    step: int
    path: Path | None
    error: str | None
    num_bytes: int
    seconds: float
    pruned: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint. manifest: complete but for its list of files. buffers: copies, since training
    goes on. small_files: configuration and tokenizer by name."""

    manifest: Manifest
    store: HostStore
    buffers: Sequence[units.Entry]
    small_files: Mapping[str, bytes]


class CheckpointWriter:
    """Writer of one checkpoint; `Saving` for the engine. `outcome` is None until it has ended."""

    def __init__(
        self,
        run: Path,
        snapshot: Snapshot,
        disk: Disk,
        keep: Retention | None = None,
        *,
        replaces: bool = False,
    ) -> None:
        """keep: checkpoints that stay once this one is complete; None: all. replaces: it takes the place of a
        folder of the same step, whatever that holds; otherwise it gets another name."""
        self._run, self._content, self._disk = run, snapshot, disk
        self._keep = keep or Retention()
        step = snapshot.manifest.step
        plain = run / f"checkpoint-{step}"
        self._target = plain if replaces else folder.free_name(run, step, snapshot.manifest.serial)
        self._staging = run / f".tmp-{self._target.name}"
        self._files: dict[str, tuple[int, str]] = {}
        self._error: str | None = None
        self._abandoned = False
        self._started = time.perf_counter()
        self.outcome: Outcome | None = None

    def write_unit(self, unit: int) -> None:
        if not self._wanted():
            return
        try:
            if not self._files:
                self._begin()
            self._write_rows(units.file_name(unit), units.entries(self._content.store, unit))
        except OSError as error:
            self._fail(error)

    def finish(self) -> None:
        pruned: list[Path] = []
        try:
            if self._wanted():
                self._commit()
            if self._wanted():
                pruned = folder.prune(self._run, self._disk, self._keep)
        except OSError as error:
            self._fail(error)
        done = self._error is None and not self._abandoned
        if not done:
            self._disk.remove(self._staging)
        self.outcome = Outcome(
            self._content.manifest.step,
            self._target if done else None,
            self._error or ("the step it was written alongside failed" if self._abandoned else None),
            sum(size for size, _ in self._files.values()),
            self._seconds(),
            tuple(pruned),
        )

    def abandon(self) -> None:
        self._abandoned = True

    @property
    def was_abandoned(self) -> bool:
        return self._abandoned

    def give_up(self, reason: str) -> None:
        """Treat the checkpoint as ended: the disk does not answer."""
        self._abandoned, self._error = True, reason
        self.outcome = Outcome(
            self._content.manifest.step, None, reason, 0, time.perf_counter() - self._started
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _wanted(self) -> bool:
        return self._error is None and not self._abandoned

    def _fail(self, error: OSError) -> None:
        self._error = f"{error.strerror or error} ({error.filename or self._staging})"

    def _begin(self) -> None:
        self._disk.remove(self._staging)  # left by a failed attempt
        self._disk.make_folder(self._staging)

    def _write_rows(self, name: str, rows: Sequence[units.Entry]) -> None:
        file = HashedFile(self._disk, self._staging / name)
        try:
            units.write(file, list(rows), self._wanted)
        finally:
            self._files[name] = file.close()

    def _write_bytes(self, name: str, data: bytes) -> None:
        path = self._staging / name
        if path.parent != self._staging and not path.parent.exists():
            self._disk.make_folder(path.parent)
        file = HashedFile(self._disk, path)
        try:
            file.write(memoryview(data))
        finally:
            self._files[name] = file.close()

    def _commit(self) -> None:
        disk, staging = self._disk, self._staging
        self._write_rows(units.BUFFERS, self._content.buffers)
        for name, data in self._content.small_files.items():
            self._write_bytes(name, data)
        for name in self._files:
            disk.sync_path(staging / name)
        files = dict(sorted(self._files.items()))
        self._write_bytes(manifest.NAME, replace(self._content.manifest, files=files).to_bytes())
        disk.sync_path(staging / manifest.NAME)
        for path in {(staging / name).parent for name in files}:
            disk.sync_path(path)
        if not self._wanted():
            return
        doomed = self._run / f".del-{self._target.name}"
        is_taken = self._target.exists()
        if is_taken:
            disk.remove(doomed)
            disk.rename(self._target, doomed)
        disk.rename(staging, self._target)
        disk.sync_path(self._run)
        if is_taken:
            disk.remove(doomed)
