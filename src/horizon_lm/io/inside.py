"""Checks that files found through a data folder lie in it.

Data folders usually come from elsewhere: a link to `~/.ssh/config`, or `../notes.txt` in a list of files,
would turn private files into training text. What users name themselves is read wherever it is.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from horizon_lm.errors import DataError


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether `file` lies in `folder` after following links. Snapshots in the Hub's cache link to the
    blobs beside them, which count as inside."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    repository = next((p.parent for p in (home, *home.parents) if p.name == "snapshots"), None)
    return repository is not None and real.is_relative_to(repository / "blobs")


def check_files(files: Iterable[Path], folder: Path, *, follow_links: bool) -> None:
    """Raise DataError for files found in `folder` that lead out of it, or are not regular files."""
    inside: set[Path] = set()  # folders already checked
    for file in files:
        if not follow_links:
            if file.is_symlink() and not is_inside(file, folder):
                raise leads_out(file, folder)
            if file.parent not in inside and not is_inside(file.parent, folder):
                raise leads_out(file, folder)
            inside.add(file.parent)
        try:
            mode = file.stat().st_mode
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror or error}", hint="check its permissions"
            ) from error
        if not stat.S_ISREG(mode):
            kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
            raise DataError(f"{file} is {kind}, not a file", hint="remove it from the folder")


def leads_out(file: Path, folder: Path) -> DataError:
    """Return the error for a file that lies outside the folder."""
    return DataError(
        f"{file} leads out of the data folder {folder}, to {file.resolve()}",
        hint=f"copy the file into it, or set datasets=[{{path: {folder}, follow_links: true}}]",
    )
