"""Every error for users has a hint: given where it is raised, or the usual one of its class."""

from __future__ import annotations

import ast
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from horizon_lm import errors
from horizon_lm.errors import CheckpointError, DataError, HorizonError

SOURCES = Path(__file__).parents[2] / "src" / "horizon_lm"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, HorizonError)
}
# Room or file -> (class, how many of them may be raised without a hint). Why they may:
ALLOWED = {
    ("checkpoint", "CheckpointError"): 99,  # the class's own hint
    ("training", "CheckpointError"): 99,  # the same
    ("data/formats.py", "DataError"): 99,  # rows: the class's own hint
    ("data/sources.py", "DataError"): 99,  # the same
    ("io/output.py", "OutputLostError"): 1,  # the reader of the pipe is gone: nothing is printed
    ("training/callbacks.py", "CallbackError"): 1,  # `fault` builds the one that is raised, with its hint
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
            keys = [key for key in ((file, name), (file.partition("/")[0], name)) if key in ALLOWED]
            found.update(keys[:1])
            unknown += [] if keys else [f"{file}:{line}: {name}"]
    assert not unknown, "\n".join(unknown)
    assert found.keys() == ALLOWED.keys(), "an exception that nothing needs any more"
    assert all(found[key] <= number for key, number in ALLOWED.items())


def test_one_without_a_hint_is_found() -> None:
    """The negative control."""
    text = (
        "raise ConfigError('a')\nraise e.DataError('a', None)\nraise ConfigError('a', 'b')\nConfigError(*a)\n"
    )
    assert list(without_hint(text)) == [("ConfigError", 1), ("DataError", 2)]


@pytest.mark.parametrize("kind", [CheckpointError, DataError])
def test_a_class_has_a_usual_hint(kind: type[HorizonError]) -> None:
    assert kind("a").hint == kind.usual_hint and kind("a", "b").hint == "b"
    assert vars(pickle.loads(pickle.dumps(kind("a")))) == vars(kind("a"))


def test_errors_that_may_lack_one_are_the_two_with_a_usual_hint() -> None:
    usual = {name for name, value in CLASSES.items() if value.usual_hint}
    assert {"CheckpointError", "DataError"} == usual
