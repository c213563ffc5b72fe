"""What the engine hands units to when a checkpoint is written."""

from __future__ import annotations

from typing import Protocol


class Saving(Protocol):
    """A checkpoint that is being written. Called on the disk lane, `abandon` on any thread.

    What goes wrong with the disk is kept for the one who asked for the checkpoint; it is no reason to
    end a step. `write_unit` returns when the unit's memory may change.
    """

    def write_unit(self, unit: int) -> None: ...

    def finish(self) -> None:
        """Nothing more will come: make it a checkpoint, or remove what there is if it was abandoned."""

    def abandon(self) -> None:
        """It will not become one; nothing more is written."""
