"""Checkpoints of one folder, written one after another, in the background if asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Retention
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.units import copied_buffers
from horizon_lm.checkpoint.writer import CheckpointWriter, Outcome, Snapshot
from horizon_lm.errors import HorizonError
from horizon_lm.host_model import HostModel
from horizon_lm.io.leftovers import temporary_folder
from horizon_lm.memory.shards import WHOLE
from horizon_lm.memory.store import state_bytes
from horizon_lm.report.metrics import versions
from horizon_lm.training.together import Together
from horizon_lm.words import size

_MARGIN = 1.1  # free disk space wanted, as a multiple of what a checkpoint needs


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds besides the model's numbers.

    config: settings. state: of the loop, JSON-ready. small_files: configuration, tokenizer and others by
    name. parent: the checkpoint that the run began from.
    """

    step: int
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    small_files: Mapping[str, bytes]
    parent: str | None = None


class CheckpointSeries:
    """Writer of a folder's checkpoints. `report` is told how each one ended.

    All ranks of a run write each checkpoint together; what else changes the folder, rank 0 does alone.
    """

    def __init__(
        self,
        folder: Path,
        model: HostModel,
        report: Callable[[Outcome], None],
        *,
        patience_seconds: float,
        replaces: bool = False,
        together: Together | None = None,
    ) -> None:
        """replaces: see `CheckpointWriter`."""
        self._together = together or Together()
        self.folder, self._model, self._report, self._replaces = folder, model, report, replaces
        self._patience_seconds = patience_seconds
        self._disk = Disk()
        self._versions = versions()
        self._writer: CheckpointWriter | None = None
        self.failed_in_a_row = 0
        self._serial = self._together.first("serial number of the next checkpoint", self._next_serial)
        self.num_bytes = checkpoint_bytes(model)
        self._base = model.base_fingerprint()
        model.engine.lanes.disk.patience_seconds = patience_seconds

    def _next_serial(self) -> int:
        with suppress(OSError):
            checkpoints.sweep(self.folder, self._disk)  # leftovers of a killed run; this run holds the lock
        found, _ = checkpoints.list_checkpoints(self.folder)
        return 1 + max((c.manifest.serial for c in found), default=0)

    @property
    def has_ended(self) -> bool:
        """Whether no checkpoint is being written, or the one that is has ended unreported."""
        writer = self._writer
        return writer is None or writer.outcome is not None or self._is_stuck(writer)

    def _is_stuck(self, writer: CheckpointWriter) -> bool:
        """Tell whether the engine has given up a writer that still waits for the disk."""
        return writer.was_abandoned and not self._model.is_saving

    def begin(self, content: Content, keep: Retention, *, background: bool, beside_bytes: int = 0) -> None:
        """Write a checkpoint of the model's state, after the one before has ended.

        keep: see `CheckpointWriter`. beside_bytes: what else the disk needs room for.
        """
        self.finish()
        problem = self._together.first(
            f"room for the checkpoint of step {content.step}", lambda: self._no_room(beside_bytes)
        )
        if problem is not None:
            self._ended(Outcome(content.step, None, problem, 0, 0.0))
            return
        self._writer = CheckpointWriter(
            self.folder,
            self._snapshot(content),
            self._disk,
            keep,
            replaces=self._replaces,
            ranks=self._together.ranks,
        )
        self._serial += 1
        self._model.save_state(self._writer, background=background)
        if not background:
            self.finish()

    def _snapshot(self, content: Content) -> Snapshot:
        adapter = self._model.skeleton.adapter
        manifest = Manifest(
            step=content.step,
            serial=self._serial,
            files={},
            config=dict(content.config),
            state={**content.state, **({"adapter": adapter.name} if adapter is not None else {})},
            versions=self._versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parent=content.parent,
            base=self._base,
        )
        buffers = copied_buffers(self._model.skeleton.model)
        return Snapshot(manifest, self._model.store, buffers, content.small_files)

    def _no_room(self, beside_bytes: int) -> str | None:
        """Say why a checkpoint is not begun; None if it can be."""
        try:
            checkpoints.sweep(self.folder, self._disk)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{error.strerror or error} ({self.folder})"
        needed = int(_MARGIN * (self.num_bytes + beside_bytes))
        what = "it and the trained model need" if beside_bytes else "it needs"
        return f"{what} {size(needed)} of disk space, {size(free)} are free" if needed > free else None

    def poll(self) -> None:
        """Report a checkpoint that has ended in the background."""
        writer = self._writer
        if writer is None:
            return
        if writer.outcome is None and self._is_stuck(writer):
            seconds = self._patience_seconds
            writer.give_up(f"the disk has not answered for {seconds:g} s (save_patience_seconds)")
        if writer.outcome is not None:
            self._writer = None
            self._ended(writer.outcome)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it."""
        if self._writer is not None:
            self._model.finish_saving()
            self.poll()

    def close(self, error: BaseException | None = None) -> None:
        """Finish what is being written, also after an error; abandon it if the run ends at once, or if other
        ranks do not end with it.

        error: what ends the run, which is reported rather than an error of the checkpoint.
        """
        if self._writer is None:
            return
        is_shared = isinstance(error, HorizonError) and error.is_shared or self._together.is_alone
        if error is not None and not (isinstance(error, Exception) and is_shared):
            self._writer.abandon()
            return
        with suppress(*(() if error is None else (Exception,))):
            self.finish()

    def _ended(self, outcome: Outcome) -> None:
        self.failed_in_a_row = 0 if outcome.error is None else self.failed_in_a_row + 1
        self._report(outcome)


def checkpoint_bytes(model: HostModel) -> int:
    """Return the bytes of a checkpoint, of all ranks together."""
    return state_bytes(model.store.units, replace(model.store.spec, shard=WHOLE))


def small_files(model: HostModel, save_tokenizer: Callable[[Path], object]) -> dict[str, bytes]:
    """Return configuration and tokenizer as files, which make a checkpoint exportable on its own; with an
    adapter also its configuration."""
    with temporary_folder("horizon-files-") as folder:
        if model.skeleton.adapter is not None:
            model.skeleton.adapter.save_config(folder)
        model.config.save_pretrained(folder)
        if model.skeleton.model.can_generate():
            model.skeleton.model.generation_config.save_pretrained(folder)
        save_tokenizer(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
