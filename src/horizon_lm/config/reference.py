"""What the settings' declarations say, in words: faults, `horizon train --help`, docs/configuration.md."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from horizon_lm.config.aliases import ALIASES, DROPPED, ENTRY_ALIASES, UNAVAILABLE, canonical_name
from horizon_lm.config.base import Settings, grouped_keys
from horizon_lm.config.train import DatasetConfig, TrainConfig
from horizon_lm.config.yaml import Document, KeyPath
from horizon_lm.errors import ConfigError

_SHOWN_FAULTS = 50  # all that a person wrote; a file of another kind would fill the screen
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
_DATASETS = (("datasets",), ("eval_datasets",))  # lists of mappings with keys of their own
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Row:
    """One setting as documented."""

    key: str
    expects: str
    default: str
    unit: str
    meaning: str


@cache
def _properties(cls: type[BaseModel]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = cls.model_json_schema()["properties"]
    return properties


def choices(schema: dict[str, Any]) -> list[str]:
    """The words that a setting allows, if it allows only some."""
    if "anyOf" in schema:
        return [word for part in schema["anyOf"] for word in choices(part)]
    return [str(word) for word in schema.get("enum", [schema["const"]] if "const" in schema else [])]


def _words(schema: dict[str, Any]) -> str:
    if schema.get("expects"):
        return str(schema["expects"])
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"])
    allowed = choices(schema)
    if allowed:
        return " | ".join(allowed)
    limits = [f"{sign} {schema[name]:g}" for name, sign in _LIMITS.items() if name in schema]
    kind = _TYPE_WORDS[schema["type"]]
    if schema.get("minLength"):
        kind = "non-empty text"
    return f"{kind} {' and '.join(limits)}".strip()


def rows(cls: type[BaseModel], keys: list[str] | None = None) -> Iterator[Row]:
    """The documentation of `keys` (all of them unless given), in order."""
    for key in keys or list(cls.model_fields):
        field, schema = cls.model_fields[key], _properties(cls)[key]
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        yield Row(key, _words(schema), default, schema.get("unit", ""), schema["description"])


def shown(value: Any) -> str:
    """A value as a user would write it, cut to 60 characters."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."


# --- faults ---------------------------------------------------------------------------------------


def explain(cls: type[Settings], error: ValidationError | None, document: Document) -> ConfigError:
    """One `ConfigError` for all that was found, by pydantic and before: a line each, the first one's hint."""
    faults: dict[str, str | None] = {one.message: one.hint for one in document.faults}
    seen: set[KeyPath] = set()
    for finding in error.errors(include_url=False) if error is not None else ():
        if finding["type"] in ("setting", "settings"):
            context = finding["ctx"]
            for one in context.get("faults", [finding]):
                told = one["ctx"] if isinstance(one, dict) else one.context
                faults[f"{_place(document, (told['key'],))}: {told['text']}"] = told["hint"]
            continue
        location = finding["loc"]
        path = location if location[:1] in _DATASETS else location[:1]  # the rest names branches of a union
        lost = document.faults and finding["type"] == "missing"  # its value is one of the faults
        if path not in seen and not lost:
            seen.add(path)
            line, hint = _fault(cls, path, finding)
            faults[f"{_place(document, path)}: {line}"] = hint
    if len(faults) == 1:
        return ConfigError(*next(iter(faults.items())))
    lines = [f"{line} ({hint})" if hint else line for line, hint in sorted(faults.items(), key=_line)]
    if len(lines) > _SHOWN_FAULTS:
        lines[_SHOWN_FAULTS:] = [f"and {len(lines) - _SHOWN_FAULTS} more"]
    return ConfigError("\n".join(lines), _ALL_SETTINGS)


def _line(entry: tuple[str, str | None]) -> int:
    """The number of the line that a fault is in; what is in none comes first."""
    found = re.match(r"[^\n]*?:([0-9]+): ", entry[0])
    return int(found[1]) if found else 0


def _place(document: Document, path: KeyPath) -> str:
    while path not in document.where and path:
        path = path[:-1]
    return document.where.get(path, "settings")


def _fault(cls: type[Settings], path: KeyPath, finding: Any) -> tuple[str, str | None]:
    inside = len(path) > 1 and path[:1] in _DATASETS
    owner: type[BaseModel] = DatasetConfig if inside else cls
    leaf = str(path[2] if len(path) > 2 else path[0])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    value = finding["input"]
    if finding["type"] == "extra_forbidden":
        return f"unknown key '{name}'", _nearest_key(owner, leaf)
    if finding["type"] == "missing":
        return f"the key '{name}' is missing", f"for example {name}={_EXAMPLES.get(leaf, 'VALUE')}"
    if inside and len(path) == 2:
        return f"{name} is {shown(value)}, expected a path or a mapping with a path", None
    schema = _properties(owner)[leaf]
    return f"{name} is {shown(value)}, expected {_words(schema)}", _value_hint(schema, value)


_EXAMPLES = {"datasets": "FILE.jsonl", "path": "FILE.jsonl"}


def _nearest_key(owner: type[BaseModel], key: str) -> str:
    if owner is DatasetConfig:
        near = get_close_matches(key, DatasetConfig.model_fields, 1)
        return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(DatasetConfig.model_fields)}"
    if key in UNAVAILABLE:
        return UNAVAILABLE[key]
    known = [*owner.model_fields, *(alias for alias in ALIASES if ALIASES[alias].key in owner.model_fields)]
    if key in TrainConfig.model_fields:
        return "this is a setting of 'horizon train', not of a model alone"
    nearest = _nearest(key[:100], known)
    return f"did you mean '{canonical_name(nearest)}'?" if nearest else _ALL_SETTINGS


def _nearest(key: str, known: list[str]) -> str | None:
    """The name that `key` is a slip of, or the only one that has all of its words; better none than a wrong
    one."""
    near = get_close_matches(key, known, 1, 0.8)
    if near:
        return near[0]
    words = set(key.replace("-", "_").split("_"))
    longer = [name for name in known if words < set(name.split("_"))]
    return longer[0] if len({canonical_name(name) for name in longer}) == 1 else None


def _value_hint(schema: dict[str, Any], value: Any) -> str | None:
    types = {part.get("type") for part in schema.get("anyOf", [schema])}
    if isinstance(value, str):
        near = get_close_matches(value[:100], choices(schema), 1, 0.5)
        if near:
            return f"did you mean '{near[0]}'?"
        if "boolean" in types and value.lower() in ("yes", "no", "on", "off"):
            return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
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


# --- documentation --------------------------------------------------------------------------------


def settings_help(width: int = 100) -> str:
    """Every setting with its default, type, unit and meaning, by group, for a terminal."""
    lines: list[str] = []
    for group, keys in grouped_keys(TrainConfig).items():
        lines += ["", f"{group} settings:", *_help_lines(rows(TrainConfig, keys), width)]
    lines += ["", "An entry of datasets, where it is a mapping:", *_help_lines(rows(DatasetConfig), width)]
    return "\n".join(lines[1:]) + "\n"


def _help_lines(help_rows: Iterator[Row], width: int) -> Iterator[str]:
    for row in help_rows:
        unit = f", in {row.unit}" if row.unit else ""
        yield f"  {row.key} = {row.default}"
        text = f"{row.meaning} [{row.expects}{unit}]"
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


_INTRO = """# Configuration

<!-- Written by `horizon config docs`; a test compares. Edit the declarations in src/horizon_lm/config*.py -->

    horizon train CONFIG.yaml [key=value ...] [--key value ...]

A configuration is a flat YAML file; `horizon config show` prints it with every default filled in.
`key=value`, `--key value` and `--key=value` on the command line win over the file; dashes and underscores in
a key are equal, a dot reaches into a mapping (`init_model.hidden_size=256`), and settings that are text are
taken verbatim. From Python, the same names are the arguments of `horizon_lm.TrainConfig`; those marked * are
also settings of `HostModel.from_pretrained`.

The reader is strict. Numbers, booleans and null are those of YAML 1.2 (`1e-5` is a number; `yes`, `no`, `on`
and `off` are text). Duplicate keys, tags, NaN, infinity and files above 1 MB are refused, and nothing is read
from the environment. An unknown key or a value of the wrong type ends with exit code 2 and a line that names
the file, the line and the nearest key.
"""


def _table(table_rows: Iterator[Row], starred: frozenset[str] = frozenset()) -> list[str]:
    lines = ["| Key | Default | Expected | Unit | Meaning |", "|---|---|---|---|---|"]
    for row in table_rows:
        star = " *" if row.key in starred else ""
        expects = row.expects.replace(" | ", ", ")
        default = row.default if row.default == "required" else f"`{row.default}`"
        lines.append(f"| `{row.key}`{star} | {default} | {expects} | {row.unit} | {row.meaning} |")
    return lines


def markdown() -> str:
    """The text of docs/configuration.md."""
    from horizon_lm.config.train import ModelSettings

    starred = frozenset(ModelSettings.model_fields)
    lines = [_INTRO]
    for group, keys in grouped_keys(TrainConfig).items():
        lines += [f"## {group}", "", *_table(rows(TrainConfig, keys), starred), ""]
    lines += ["## An entry of `datasets`", "", "A path alone stands for `path: ...` with the defaults.", ""]
    lines += [*_table(rows(DatasetConfig)), "", "## Names from other trainers", ""]
    lines += [
        "Accepted, reported once, and absent from the saved configuration. A second name of the same setting"
    ]
    lines += ["beside the first is an error.", "", "| Name | Read as |", "|---|---|"]
    lines += [f"| `{name}` | `{alias.key}` |" for name, alias in ALIASES.items()]
    lines += [f"| `{name}` | nothing: {reason} |" for name, reason in DROPPED.items()]
    lines += [f"| `{name}` of a dataset | `{key}` of a dataset |" for name, key in ENTRY_ALIASES.items()]
    return "\n".join(lines) + "\n"
