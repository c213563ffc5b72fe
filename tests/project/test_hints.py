"""Every error for users is raised with a hint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.raises import SOURCES, raised

# (file, class) -> why it may be raised without one.
ALLOWED = {
    ("io/output.py", "OutputLostError"): "the reader of the pipe is gone: nothing is printed",
    ("training/callbacks.py", "CallbackError"): "`fault` builds the one that is raised, with its hint",
    ("training/loop.py", "CheckpointError"): "caught where it is raised; only its message is shown",
}


def without_hint(text: str) -> Iterator[tuple[str, int]]:
    """Yield class and line of each error that is built from a message alone, or with None as its hint."""
    yield from ((one.name, one.line) for one in raised(text) if one.hint is None)


def test_every_error_has_a_hint() -> None:
    found: Counter[tuple[str, str]] = Counter()
    unknown = []
    for path in sorted(SOURCES.rglob("*.py")):
        file = path.relative_to(SOURCES).as_posix()
        for name, line in without_hint(path.read_text(encoding="utf-8")):
            found[file, name] += 1
            if found[file, name] > 1 or (file, name) not in ALLOWED:
                unknown.append(f"{file}:{line}: {name}")
    assert not unknown, "\n".join(unknown)
    assert found.keys() == ALLOWED.keys(), "an exception that nothing needs any more"


def test_one_without_a_hint_is_found() -> None:
    """The negative control."""
    text = (
        "raise ConfigError('a')\nraise e.DataError('a', None)\nraise ConfigError('a', 'b')\nConfigError(*a)\n"
    )
    assert list(without_hint(text)) == [("ConfigError", 1), ("DataError", 2)]
