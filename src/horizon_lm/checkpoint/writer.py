"""Write a checkpoint atomically, on the disk lane.

1. Write unit files, buffers, configuration and tokenizer to .tmp-checkpoint-STEP/ and fsync them.
2. Write and fsync manifest.json (size and xxh3-128 of each file), then fsync the folders.
3. Rename to checkpoint-STEP, fsync the run folder, prune old checkpoints.

Of several ranks each writes what it holds of the units, and an index of it, to a folder rank-RANK/; all else
is done by rank 0. It writes the manifest once all ranks have synced their files.

A disk error fails the checkpoint, not the step; that of one rank fails it for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horizon_lm.checkpoint import folder, index, manifest, units
from horizon_lm.checkpoint.agreement import Agreed, Agreement, JointAgreement, Values
from horizon_lm.checkpoint.disk import Disk, HashedFile
from horizon_lm.checkpoint.folder import Retention
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.memory.store import HostStore

_STEP_FAILED = "the step it was written alongside failed"
_PATIENCE_SECONDS = 60.0  # until a folder that another node has made must be visible


@dataclass(frozen=True)
class Outcome:
    """How a checkpoint ended, the same on all ranks. path: None if it failed; error: why. seconds: from the
    request to the end."""

    step: int
    path: Path | None
    error: str | None
    num_bytes: int
    seconds: float
    pruned: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint; with several ranks, rank 0's counts, except for `store`.

    manifest: complete but for its files and ranks. buffers: copies, since training goes on. small_files:
    configuration and tokenizer by name.
    """

    manifest: Manifest
    store: HostStore
    buffers: Sequence[units.Entry]
    small_files: Mapping[str, bytes]


class CheckpointWriter:
    """Writer of one checkpoint; `Saving` for the engine. `outcome` is None until it has ended.

    All ranks make one at the same point of the run, with the same arguments.
    """

    def __init__(
        self,
        run: Path,
        snapshot: Snapshot,
        disk: Disk,
        keep: Retention | None = None,
        *,
        replaces: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """keep: checkpoints that stay once this one is complete; None: all. replaces: it takes the place of a
        folder of the same step, whatever that holds; otherwise it gets another name. ranks: those of the
        store."""
        self._run, self._content, self._disk, self._ranks = run, snapshot, disk, ranks
        self._keep = keep or Retention()
        step = snapshot.manifest.step
        plain = run / f"checkpoint-{step}"
        self._target = plain if replaces else folder.free_name(run, step, snapshot.manifest.serial)
        self._own_folder = manifest.rank_folder(ranks.rank) + "/" if ranks.world > 1 else ""
        self._index: dict[str, index.Listed] = {}
        self._files: dict[str, tuple[int, str]] = {}
        self._error: str | None = None
        self._abandoned = self._has_begun = False
        self._started = time.perf_counter()
        self._agreement = JointAgreement(ranks, self._end) if ranks.world > 1 else Agreement(self._end)
        self.outcome: Outcome | None = None

    # Called by the engine.

    def write_unit(self, unit: int) -> None:
        if not self._wanted():
            return
        try:
            self._begin()
            rows = units.entries(self._content.store, unit)
            if self._wanted() and rows:
                self._write_unit(unit, rows)
        except OSError as error:
            self._fail(error)

    def finish(self) -> None:
        own = self._write_rest()
        reports = self._agreement.report(own)
        result = None
        if self._ranks.is_first:
            if not any(report["error"] for report in reports):
                result = self._commit(reports)
            if result is None or result["error"] is not None:
                self._disk.remove(self._staging)
        self._agreement.end(result)

    def abandon(self) -> None:
        self._abandoned = True
        # Also called if the disk does not answer: `finish` may never come.
        self._agreement.give_up(self._failed(f"{_STEP_FAILED}, or the disk did not answer in time"))

    @property
    def was_abandoned(self) -> bool:
        return self._abandoned

    def give_up(self, reason: str) -> None:
        """Treat the checkpoint as ended: the disk does not answer. Waits for the other ranks."""
        self._abandoned, self._error = True, reason
        if self._ranks.world > 1:
            self._agreement.give_up(self._failed(reason))
            self._agreement.end(None)
        else:
            self._end(Agreed([self._failed(reason)], None))

    # On the disk lane.

    @property
    def _staging(self) -> Path:
        return self._run / f".tmp-{self._target.name}"

    def _wanted(self) -> bool:
        return self._error is None and not self._abandoned

    def _fail(self, error: OSError) -> None:
        self._error = f"{error.strerror or error} ({error.filename or self._staging})"

    def _begin(self) -> None:
        """Make the staging folder, or learn its name from rank 0, and this rank's folder in it."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._ranks.is_first:
            try:
                self._disk.remove(self._staging)  # left by a failed attempt
                self._disk.make_folder(self._staging)
            except OSError as error:
                self._fail(error)
        begun = self._agreement.begin({"name": self._target.name, "error": self._error})
        if begun["error"] is not None:
            self._error = begun["error"]
            return
        self._target = self._run / begun["name"]
        if self._own_folder:
            self._make_own_folder()

    def _make_own_folder(self) -> None:
        """Make it once this node sees the staging folder: network file systems remember for a while what was
        not there."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._disk.make_folder(self._staging / self._own_folder)
            except FileNotFoundError:
                if time.monotonic() > deadline or not self._wanted():
                    raise
                os.listdir(self._run)
                time.sleep(0.1)

    def _write_unit(self, unit: int, rows: list[units.Entry]) -> None:
        name = self._own_folder + units.file_name(unit)
        file = self._write_rows(name, rows)
        if self._own_folder:
            store = self._content.store
            parts = [part for part, _ in units.parts(store.units[unit], store.spec, store.spec.shard)]
            self._index[units.file_name(unit)] = index.Listed(parts, file.blocks)

    def _write_rows(self, name: str, rows: Sequence[units.Entry]) -> HashedFile:
        file = HashedFile(self._disk, self._staging / name, in_blocks=bool(self._own_folder))
        try:
            units.write(file, list(rows), self._wanted)
        finally:
            self._files[name] = file.close()
        return file

    def _write_bytes(self, name: str, data: bytes) -> None:
        path = self._staging / name
        if path.parent != self._staging and not path.parent.exists():
            self._disk.make_folder(path.parent)
        file = HashedFile(self._disk, path)
        try:
            file.write(memoryview(data))
        finally:
            self._files[name] = file.close()

    def _write_rest(self) -> Values:
        """Write and sync all of this rank's files but the manifest; return its report."""
        try:
            if self._wanted():
                self._begin()
            if self._wanted():
                if self._own_folder:
                    data = index.to_bytes(self._index, self._disk.block_bytes)
                    self._write_bytes(self._own_folder + manifest.INDEX, data)
                if self._ranks.is_first:
                    self._write_rows(units.BUFFERS, self._content.buffers)
                    for name, data in self._content.small_files.items():
                        self._write_bytes(name, data)
                for name in self._files:
                    self._disk.sync_path(self._staging / name)
                if self._own_folder:
                    self._disk.sync_path(self._staging / self._own_folder)
        except OSError as error:
            self._fail(error)
        return self._report()

    def _report(self) -> Values:
        error = self._error or (_STEP_FAILED if self._abandoned else None)
        return {"files": self._files, "error": error, "seconds": self._seconds()}

    def _failed(self, reason: str) -> Values:
        return {"files": {}, "error": reason, "seconds": self._seconds()}

    def _commit(self, reports: Sequence[Values]) -> Values:
        """Write the manifest and put the folder in place; return the end of the checkpoint."""
        pruned: list[Path] = []
        try:
            self._put_in_place({name: entry for report in reports for name, entry in report["files"].items()})
            if self._wanted():
                pruned = folder.prune(self._run, self._disk, self._keep)
        except OSError as error:
            self._fail(error)
        return {**self._report(), "pruned": [path.name for path in pruned]}

    def _put_in_place(self, files: Mapping[str, tuple[int, str]]) -> None:
        disk, staging = self._disk, self._staging
        content = replace(self._content.manifest, files=dict(sorted(files.items())), ranks=self._ranks.world)
        folders = {(staging / name).parent for name in self._files}
        self._write_bytes(manifest.NAME, content.to_bytes())
        disk.sync_path(staging / manifest.NAME)
        for path in folders:
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

    # At the end.

    def _end(self, agreed: Agreed) -> None:
        """Set the outcome from what all ranks know."""
        told = [*agreed.reports, *([agreed.end] if agreed.end is not None else [])]
        failed = next((number for number, one in enumerate(told) if one["error"] is not None), None)
        error = None
        if failed is not None:
            rank = failed % self._ranks.world  # the end is rank 0's
            error = (
                f"rank {rank}: {told[failed]['error']}" if self._ranks.world > 1 else told[failed]["error"]
            )
        files = {name: entry for one in told for name, entry in one["files"].items()}
        self.outcome = Outcome(
            self._content.manifest.step,
            self._target if error is None else None,
            error,
            sum(num_bytes for num_bytes, _ in files.values()),
            max(one["seconds"] for one in told),
            tuple(self._run / name for one in told for name in one.get("pruned", ())),
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._started
