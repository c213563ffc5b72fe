"""The configurations that come with the package: `horizon train quickstart` works in any folder.

They are the files in `configs/` of a checkout. The package sees them through the link `examples` beside this
module; sdist and wheel hold the files in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

from horizon_lm.errors import ConfigError

_FOLDER = Path(__file__).parent / "examples"


def names() -> list[str]:
    """Return the names of the configurations, such as `quickstart`."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def located(place: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the file of a shipped configuration if `place` is its name; else `place` itself.

    A file of that name in the current folder comes first.
    """
    name = os.fspath(place)
    return _FOLDER / f"{name}.yaml" if name in names() and not os.path.isfile(name) else place


def text_of(name: str) -> str:
    """Return the text of a shipped configuration. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(f"no configuration {name!r} comes with the package", hint=" | ".join(names()))
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def hint_for(place: str) -> str:
    """Return the hint for a missing file: the name of the shipped configuration that was meant, if any."""
    stem = Path(place).stem
    if stem in names():
        return f"write {stem}, without folder and suffix, for the one that comes with the package"
    return "give the path of a YAML file, or key=value pairs"
