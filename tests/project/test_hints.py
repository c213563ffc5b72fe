"""Every error for users is raised with a hint."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from horizon_lm import errors
from horizon_lm.errors import HorizonError

SOURCES = Path(__file__).parents[2] / "src" / "horizon_lm"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, HorizonError)
}
# (file, class) -> why it may be raised without one.
ALLOWED = {
    ("io/output.py", "OutputLostError"): "the reader of the pipe is gone: nothing is printed",
    ("training/callbacks.py", "CallbackError"): "`fault` builds the one that is raised, with its hint",
    ("training/loop.py", "CheckpointError"): "caught where it is raised; only its message is shown",
}


def without_hint(text: str) -> Iterator[tuple[str, int]]:
    """Yield class and line of each error that is built from a message alone, or with None as its hint."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not node.args or isinstance(node.args[0], ast.Starred):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        hints = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "hint")]
        is_none = any(isinstance(hint, ast.Constant) and hint.value is None for hint in hints)
        if name in CLASSES and (not hints or is_none):
            yield name, node.lineno


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
