"""The reference of all settings: `horizon train --help` and docs/configuration.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from horizon_lm.config.aliases import ALIASES, DROPPED, ENTRY_ALIASES
from horizon_lm.config.base import grouped_keys
from horizon_lm.config.data import DatasetConfig
from horizon_lm.config.faults import expected, properties, shown
from horizon_lm.config.model import ModelSettings
from horizon_lm.config.train import TrainConfig


@dataclass(frozen=True)
class Row:
    """One setting as documented."""

    key: str
    expects: str
    default: str
    unit: str
    meaning: str


def rows(cls: type[BaseModel], keys: list[str] | None = None) -> Iterator[Row]:
    """Yield the documentation of `keys`, by default of all settings, in order."""
    for key in keys or list(cls.model_fields):
        field, schema = cls.model_fields[key], properties(cls)[key]
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        yield Row(key, expected(schema), default, schema.get("unit", ""), schema["description"])


def settings_help(width: int = 100) -> str:
    """List all settings by group, with default, meaning, type and unit, for a terminal."""
    lines: list[str] = []
    for group, keys in grouped_keys(TrainConfig).items():
        lines += ["", f"{group} settings:", *_help_lines(rows(TrainConfig, keys), width)]
    lines += ["", "An entry of datasets, as a mapping:", *_help_lines(rows(DatasetConfig), width)]
    return "\n".join(lines[1:]) + "\n"


def _help_lines(help_rows: Iterator[Row], width: int) -> Iterator[str]:
    for row in help_rows:
        unit = f", in {row.unit}" if row.unit else ""
        yield f"  {row.key} = {row.default}"
        text = f"{row.meaning} [{row.expects}{unit}]"
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


_INTRO = """# Configuration

<!-- Written by `horizon config docs`; a test compares. Edit the declarations in src/horizon_lm/config/ -->

    horizon train CONFIG.yaml [key=value ...] [--key value ...]

A configuration is a flat YAML file; `horizon config show` prints it with every default filled in.
`key=value`, `--key value` and `--key=value` on the command line override the file. Dashes and underscores in
a key are equal, a dot reaches into a mapping (`init_model.hidden_size=256`), and text settings are verbatim.
In Python the same names are arguments of `horizon_lm.TrainConfig`; those marked * are also arguments of
`HostModel.from_pretrained`.

The reader is strict. Numbers, booleans and null follow YAML 1.2 (`1e-5` is a number; `yes`, `no`, `on` and
`off` are text). It rejects duplicate keys, tags, NaN, infinity and files above 1 MB, and never reads the
environment. An unknown key or a value of the wrong type exits with code 2 and names the file, the line and
the nearest key.
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
    """Write docs/configuration.md."""
    starred = frozenset(ModelSettings.model_fields)
    lines = [_INTRO]
    for group, keys in grouped_keys(TrainConfig).items():
        lines += [f"## {group}", "", *_table(rows(TrainConfig, keys), starred), ""]
    lines += ["## An entry of `datasets`", "", "A path alone means `path: ...` with the defaults.", ""]
    lines += [*_table(rows(DatasetConfig)), "", "## Names from other trainers", ""]
    lines += [
        "Accepted, reported once, and absent from the saved configuration. Two names of the same setting"
    ]
    lines += ["in one file are an error.", "", "| Name | Read as |", "|---|---|"]
    lines += [f"| `{name}` | `{alias.key}` |" for name, alias in ALIASES.items()]
    lines += [f"| `{name}` | nothing: {reason} |" for name, reason in DROPPED.items()]
    lines += [f"| `{name}` of a dataset | `{key}` of a dataset |" for name, key in ENTRY_ALIASES.items()]
    return "\n".join(lines) + "\n"
