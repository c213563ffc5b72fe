"""Error messages for rejected settings: file and line, key, value, expectation, hint.

`explain` is handed the settings class; this module imports none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from horizon_lm.config.aliases import ALIASES, UNAVAILABLE, canonical_name
from horizon_lm.config.yaml import Document, KeyPath
from horizon_lm.errors import ConfigError

_MOST_SHOWN = 50  # all that a person wrote; a file of another kind would fill the screen
_MOST_IN_HINT = 60  # characters of a value
_ALL_SETTINGS = "'horizon train --help' lists every setting"
_TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def explain(
    cls: type[BaseModel], error: ValidationError | None, document: Document, elsewhere: Collection[str] = ()
) -> ConfigError:
    """Merge all errors of a document and of pydantic into one `ConfigError`, one line each.

    elsewhere: settings of `horizon train` that `cls` lacks. A single error keeps its own hint.
    """
    lines: dict[str, str | None] = {one.message: one.hint for one in document.faults}
    seen: set[KeyPath] = set()
    for finding in error.errors(include_url=False) if error is not None else ():
        if finding["type"] in ("setting", "settings"):
            lines.update(_own_lines(finding, document))
            continue
        location = finding["loc"]
        # Beyond the key, only entries have paths of their own; elsewhere the rest names branches of a union.
        path = location if _entry_class(cls, location[0]) else location[:1]
        is_lost = document.faults and finding["type"] == "missing"  # its value is one of document.faults
        if path not in seen and not is_lost:
            seen.add(path)
            line, hint = _line_of(cls, path, finding, elsewhere)
            lines[f"{_place(document, path)}: {line}"] = hint
    if len(lines) == 1:
        message, hint = next(iter(lines.items()))
        return ConfigError(message, hint or _default_hint(cls, *seen))
    by_line = sorted(lines.items(), key=_line_number)
    shown_lines = [f"{line} ({hint})" if hint else line for line, hint in by_line]
    if len(shown_lines) > _MOST_SHOWN:
        shown_lines[_MOST_SHOWN:] = [f"and {len(shown_lines) - _MOST_SHOWN} more"]
    return ConfigError("\n".join(shown_lines), _ALL_SETTINGS)


def _own_lines(finding: Any, document: Document) -> Iterator[tuple[str, str | None]]:
    """Yield line and hint of each error that our own validators raised (`base.fault`)."""
    for one in finding["ctx"].get("faults", [finding]):
        context = one["ctx"] if isinstance(one, dict) else one.context
        yield f"{_place(document, (context['key'],))}: {context['text']}", context["hint"]


def _line_number(entry: tuple[str, str | None]) -> int:
    """Return the line that an error names, 0 if it names none."""
    found = re.match(r"[^\n]*?:([0-9]+): ", entry[0])
    return int(found[1]) if found else 0


def _place(document: Document, path: KeyPath) -> str:
    while path not in document.where and path:
        path = path[:-1]
    return document.where.get(path, "settings")


def _entry_class(cls: type[BaseModel], key: str | int) -> type[BaseModel] | None:
    """Return the class of a list setting's entries (`datasets`), None for other settings."""
    field = cls.model_fields.get(str(key))
    kinds = get_args(field.annotation) if field is not None else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _line_of(
    cls: type[BaseModel], path: KeyPath, finding: Any, elsewhere: Collection[str]
) -> tuple[str, str | None]:
    entry = _entry_class(cls, path[0]) if len(path) > 1 else None
    owner = entry or cls
    leaf = str(path[2] if len(path) > 2 else path[0])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    value = finding["input"]
    if finding["type"] == "extra_forbidden":
        hint = _nearest_entry_key(entry, leaf) if entry else _nearest_key(cls, leaf, elsewhere)
        return f"unknown key '{name}'", hint
    if finding["type"] == "missing":
        return f"the key '{name}' is missing", f"for example {name}={_EXAMPLES.get(leaf, 'VALUE')}"
    if entry and len(path) == 2:
        problem = f"{name} is {shown(value)}, expected a path or a mapping with a path"
        return problem, "write - path: FILE.jsonl"
    schema = properties(owner)[leaf]
    problem = f"{name} is {shown(value)}, expected {expected(schema)}"
    return problem, _value_hint(schema, value) or _list_hint(leaf, schema, value)


_EXAMPLES = {"datasets": "FILE.jsonl", "path": "FILE.jsonl"}


def _nearest_entry_key(cls: type[BaseModel], key: str) -> str:
    near = get_close_matches(key, cls.model_fields, 1)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(cls.model_fields)}"


def _nearest_key(cls: type[BaseModel], key: str, elsewhere: Collection[str]) -> str:
    if key in UNAVAILABLE:
        return UNAVAILABLE[key]
    if key in elsewhere:
        return "this is a setting of 'horizon train', not of a model alone"
    known = [*cls.model_fields, *(alias for alias in ALIASES if ALIASES[alias].key in cls.model_fields)]
    nearest = _nearest(key[:100], known)
    return f"did you mean '{canonical_name(nearest)}'?" if nearest else _ALL_SETTINGS


def _nearest(key: str, known: list[str]) -> str | None:
    """Return the name that `key` misspells, or the only one with all of its words, else None."""
    near = get_close_matches(key, known, 1, 0.8)
    if near:
        return near[0]
    words = set(key.replace("-", "_").split("_"))
    longer = [name for name in known if words < set(name.split("_"))]
    return longer[0] if len({canonical_name(name) for name in longer}) == 1 else None


def _default_hint(cls: type[BaseModel], path: KeyPath = ()) -> str:
    """Return the hint of an error that has no better one."""
    field = cls.model_fields.get(str(path[0])) if len(path) == 1 else None
    if field is None or field.is_required():
        return _ALL_SETTINGS
    return f"leave it out for the default, {shown(field.get_default(call_default_factory=True))}"


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _value_hint(schema: dict[str, Any], value: Any) -> str | None:
    types = {part.get("type") for part in schema.get("anyOf", [schema])}
    if isinstance(value, str):
        near = get_close_matches(value[:100], choices(schema), 1, 0.5)
        if near:
            return f"did you mean '{near[0]}'?"
        if "boolean" in types and value.lower() in ("yes", "no", "on", "off"):
            return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
        if types & {"number", "integer"} and re.fullmatch(
            r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value.lower()
        ):
            return "write the number without quotes"
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return f"write {int(value)}"
    if (
        isinstance(value, (int, float))
        and "string" in types
        and not choices(schema)
        and "expects" not in schema
    ):
        return "put it in quotes to make it text"
    return None


def _list_hint(key: str, schema: dict[str, Any], value: Any) -> str | None:
    """Suggest a list of names in place of the same names as text."""
    parts = schema.get("anyOf", [schema])
    takes_names = any(part.get("items", {}).get("type") == "string" for part in parts)
    if not (takes_names and isinstance(value, str) and value.strip()) or len(value) > _MOST_IN_HINT:
        return None
    names = [name.strip() for name in value.split(",")]
    if len(names) > 1 and not all(re.fullmatch(r"[\w ]+", name) for name in names):
        return None  # a comma may be part of a regular expression
    return f"{key}={json.dumps(names, ensure_ascii=False)}"


# A setting's JSON schema in words.


@cache
def properties(cls: type[BaseModel]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = cls.model_json_schema()["properties"]
    return properties


def choices(schema: dict[str, Any]) -> list[str]:
    """Return the words that a setting allows; empty if it is not limited to some."""
    if "anyOf" in schema:
        return [word for part in schema["anyOf"] for word in choices(part)]
    return [str(word) for word in schema.get("enum", [schema["const"]] if "const" in schema else [])]


def expected(schema: dict[str, Any]) -> str:
    """Describe the values that a setting takes."""
    if schema.get("expects"):
        return str(schema["expects"])
    if "anyOf" in schema:
        return " or ".join(expected(part) for part in schema["anyOf"])
    allowed = choices(schema)
    if allowed:
        return " | ".join(allowed)
    limits = [f"{sign} {schema[name]:g}" for name, sign in _LIMITS.items() if name in schema]
    kind = _TYPE_WORDS[schema["type"]]
    if schema.get("minLength"):
        kind = "non-empty text"
    return f"{kind} {' and '.join(limits)}".strip()


def shown(value: Any) -> str:
    """Format a value as a user would write it, cut to 60 characters."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."
