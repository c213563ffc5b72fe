"""A strict YAML reader and writer, on PyYAML's parser.

PyYAML implements YAML 1.1: `1e-5` is a string, `010` is 8, `1:30` is 90, `no` is False, and the last of two
equal keys wins. This reader follows the core schema of YAML 1.2 and rejects what a configuration never needs:
duplicate keys, tags, merge keys, NaN and infinity, documents above `MAX_BYTES`, `MAX_NODES` or `MAX_DEPTH`
(an alias counts at each use, so nested aliases cannot explode). Keys are always text. Every error is one
`ConfigError` that names `file:line`. Not ruamel.yaml: it keeps line numbers and rejects duplicate keys, but
tags, merge keys, NaN, the caps and our messages would need the same code again, on a second YAML library.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from horizon_lm.config.shipped import hint_for
from horizon_lm.errors import ConfigError
from horizon_lm.io import files

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 64

KeyPath = tuple[str | int, ...]

_IS_OTHER = "give the path of a configuration file, as 'horizon init' writes"

_TAG = "tag:yaml.org,2002:"
_SCALARS = (  # YAML 1.2, chapter 10.3.2: tag, pattern, possible first characters
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+0123456789."),
    ),
)


@dataclass(frozen=True)
class Document:
    """A mapping and, for each path in it, the place where it was written (`file:line`).

    faults: errors in keys that are not in `values`, reported together with later ones.
    """

    values: dict[str, Any]
    where: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[ConfigError] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # without YAML 1.1's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = 0
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            _refuse(f"the tag '{event.tag}' is not allowed", event.start_mark)
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES:
            _refuse(f"more than {MAX_NODES} values", event.start_mark)
        if self.depth > MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """A dumper whose text means the same to this reader and to a YAML 1.1 reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> Any:
    plain = text.isprintable() and text == text.strip()
    return dumper.represent_scalar(_TAG + "str", text, style=None if plain else '"')


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
    # On top of YAML 1.1's, so that text that either version would read as another type gets quotes.
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
_Dumper.add_representer(str, _represent_text)


def _refuse(problem: str, mark: Any) -> Any:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Builder:
    """A converter from composed nodes to plain values that records the line of each."""

    def __init__(self, place: str, with_lines: bool) -> None:
        self.place = place
        self.with_lines = with_lines
        self.where: dict[KeyPath, str] = {}
        self.visits = 0

    def build(self, node: Any, path: KeyPath = ()) -> Any:
        self.visits += 1
        if self.visits > MAX_NODES or len(path) > MAX_DEPTH:
            _refuse("aliases expand to too many values, or to themselves", node.start_mark)
        self.note(path, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse("a key must be text", key_node.start_mark)
            key = key_node.value
            if key in result:
                _refuse(f"duplicate key '{key}'", key_node.start_mark)
            if key == "<<" and key_node.style is None:
                _refuse("merge keys ('<<') are not supported", key_node.start_mark)
            result[key] = self.build(value_node, (*path, key))
            self.note((*path, key), key_node)
        return result

    def note(self, path: KeyPath, node: Any) -> None:
        line = node.start_mark.line + 1
        self.where[path] = f"{self.place}:{line}" if self.with_lines else self.place


def _scalar(node: Any) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 64:
            _refuse(f"the number {text[:20]}... is too large", node.start_mark)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if kind == "float":
        number = float(re.sub(r"\.(inf|nan)\Z", r"\1", text.lower()))
        if not math.isfinite(number):
            _refuse(f"{text} is not a finite number", node.start_mark)
        return number
    return text


def _parse(text: str, place: str, *, with_lines: bool) -> tuple[Any, dict[KeyPath, str]]:
    builder = _Builder(place, with_lines)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else builder.build(node)), builder.where
    except yaml.reader.ReaderError as error:
        # `position` restarts after each chunk of a stream; a str is one chunk.
        line = text.count("\n", 0, error.position) + 1
        at = f"{place}:{line}" if with_lines else place
        character = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(
            f"{at}: the character U+{character:04X} is not allowed in YAML", "save the file as plain text"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{place}:{mark.line + 1}" if with_lines and mark is not None else place
        problem = error.problem or error.context or "not valid YAML"
        raise ConfigError(f"{at}: {problem}", _syntax_hint(problem)) from None


def _syntax_hint(problem: str) -> str:
    if "'\\t'" in problem:
        return "indent with spaces, not tabs"
    if "cannot start any token" in problem:
        return "quote text that begins with a special character"
    if "mapping values are not allowed" in problem:
        return "quote text that contains ': ', and check the indentation"
    if "duplicate key" in problem:
        return "remove one of the two lines"
    return "correct the line, or quote its text"


def read_text(text: str, place: str) -> Document:
    """Read a document whose top level is a mapping; `place` names it in errors."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{place}: larger than {MAX_BYTES} bytes, which no configuration is", _IS_OTHER)
    values, where = _parse(text, place, with_lines=True)
    if values is None:
        return Document({}, {(): place})
    if not isinstance(values, dict):
        raise ConfigError(
            f"{place}: expected lines of the form 'key: value', found {_kind(values)}", _IS_OTHER
        )
    return Document(values, {**where, (): place})


def read_file(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file of at most `MAX_BYTES`, in UTF-8."""
    place = os.fspath(path)
    try:
        raw = files.read_stream(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file", hint_for(place)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{place}: cannot be read: {reason}", _IS_OTHER) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{place}: larger than {MAX_BYTES} bytes, which no configuration is", _IS_OTHER)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{place}:{line}: not UTF-8 text", "save the file as UTF-8") from None
    return read_text(text, place)


def read_value(text: str, place: str) -> Any:
    """Read one value, as it would follow `key: ` in a file; `place` names it in errors."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{place}: larger than {MAX_BYTES} bytes", "put it into a file")
    return _parse(text, place, with_lines=False)[0]


def split_override(text: str) -> tuple[tuple[str, ...], str]:
    """Split `key=value` or `--key=value` into (path, value text). Dashes become underscores; dots nest."""
    key, equals, value = text.removeprefix("--").partition("=")
    path = tuple(key.strip().replace("-", "_").split("."))
    if not equals or not all(path):
        raise ConfigError(
            f"command line: '{text}' is not of the form key=value", "for example learning_rate=1e-5"
        )
    return path, value


def dump(values: dict[str, Any]) -> str:
    """Write YAML that this and YAML 1.1 readers turn back into identical values."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=False
    )


def _kind(value: Any) -> str:
    if isinstance(value, (list, str)):
        return "a list" if isinstance(value, list) else "text"
    return f"the value {value!r}"
