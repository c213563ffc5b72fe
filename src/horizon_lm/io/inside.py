"""Files that belong to a data folder, and those outside it to which a link or a list of names in it leads.

A folder of data comes from elsewhere as a rule. A link in it to `~/.ssh/config`, or `../notes.txt` in a list
of its files, would turn private files into training text. What a user names is read wherever it is.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from horizon_lm.errors import DataError


def is_inside(file: Path, folder: Path) -> bool:
    """Whether `file` lies in `folder` once links are followed. The snapshots of the Hub's cache are links to
    the blobs beside them, which belong to them."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    repository = next((p.parent for p in (home, *home.parents) if p.name == "snapshots"), None)
    return repository is not None and real.is_relative_to(repository / "blobs")


def check_files(files: Iterable[Path], folder: Path, *, follow_links: bool) -> None:
    """Raise DataError for what was found in `folder` and leads out of it, or is not a file (a pipe, say)."""
    inside: set[Path] = set()  # folders of files that are
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
    """The error for a file outside the folder that was to be read."""
    return DataError(
        f"{file} leads out of the data folder {folder}, to {file.resolve()}",
        hint=f"copy the file into it, or datasets=[{{path: {folder}, follow_links: true}}]",
    )
