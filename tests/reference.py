"""Write the generated pages of the documentation: `make reference`.

docs/configuration.md is what `horizon config docs` prints, docs/reference/commands.md comes from the help
of the commands, and docs/reference/errors.md from the places in the source that build an error
(tests/raises.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.raises import CLASSES, Raised, all_raised, pattern

from horizon_lm.config.reference import markdown
from horizon_lm.errors import HorizonError

ROOT = Path(__file__).parents[1]
_AREAS = {
    "cli": "Command line",
    "config": "Configuration file",
    "data": "Data",
    "model": "Models",
    "training": "Training runs",
    "preference": "Preferences",
    "checkpoint": "Checkpoints and run folders",
    "plan": "Planning",
    "bench": "Benchmarks",
    "report": "Reports and trackers",
    "machine": "Machine and hardware profiles",
    "distributed": "Several ranks",
    "trainers": "TRL's trainers",
    "io": "Files, output and the Hub",
}
_LIBRARY = "Python interface and engine"  # host_model, micro_batches, engine, memory, optim, ...
_CODES = {
    1: "a bug, a callback, another rank, or output",
    2: "configuration or usage",
    3: "does not fit",
    4: "data",
    5: "checkpoint",
    6: "non-finite numbers",
    7: "not uploaded",
}
_NOTE = "<!-- Written by `make reference`; a test compares. Edit {} -->"

_COMMANDS = f"""# Commands

{_NOTE.format("the commands in src/horizon_lm/cli/")}

`horizon COMMAND --help` prints the same. `horizon train --help` also lists [all
settings](../configuration.md). Commands that read a configuration take `key=value`, `--key value` and
`--key=value` to override it. `--debug`, anywhere, shows a traceback with every error.

Exit codes: 0 done, 1 a bug, 2 configuration or usage, 3 does not fit, 4 data, 5 checkpoint, 6 non-finite
numbers, 7 trained and saved but not uploaded, 75 and 130 stopped from outside and saved ([what to
do](../troubleshooting.md#exit-codes)).

| command | action |
| --- | --- |
"""

_ERRORS = f"""# Errors

{_NOTE.format("the errors where the source raises them")}

Every error that the commands and the library raise for users, with its hint, grouped by exit code and part
of the program. *Italic* words are filled in. `/` separates alternatives.
[Troubleshooting](../troubleshooting.md) explains the exit codes and the most common errors.
"""


def commands() -> str:
    """Return docs/reference/commands.md, from typer's own Markdown of the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "horizon_lm.cli.command", "utils", "docs", "--name", "horizon"],
        capture_output=True,
        text=True,
        check=True,
    )
    sections = re.split(r"^(?=##+ )", done.stdout, flags=re.M)[1:]
    table = [_command_row(text) for text in sections if not _has_commands(text)]
    texts = "\n".join(_command(text) for text in sections)
    return _COMMANDS + "\n".join(table) + f"\n\n{texts.rstrip()}\n"


def _has_commands(section: str) -> bool:
    return "**Commands**" in section


def _command_row(section: str) -> str:
    heading, text = section.split("\n\n")[:2]
    name = heading.strip("# `")
    action = re.split(r"(?<=[^.])[.](?:\s|$)", text)[0].replace("\n", " ")
    return f"| [`{name}`](#{name.replace(' ', '-')}) | {action} |"


def _command(section: str) -> str:
    """Drop what every command has, --help, and the shortened list of a group's commands."""
    section = re.sub(r"^\* `--help`: .*\n", "", section, flags=re.M)
    section = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?", "", section)
    section = re.sub(r"\*\*Options\*\*:\n\n(?=\n|$|\*\*)", "", section)
    section = re.sub(r"(?<!`)(<\w+>)(?!`)(?= )", r"`\1`", section)
    return section.rstrip() + "\n"


def errors(found: Iterable[Raised] | None = None) -> str:
    """Return docs/reference/errors.md, of all errors that the package builds."""
    rows: dict[tuple[int, str], dict[str, None]] = {}
    for one in all_raised() if found is None else found:
        message = pattern(one.message, one.scope)
        if re.fullmatch(r"(\{[^{}]*\}[:; ]*)+", message):  # is made elsewhere, or by a library
            continue
        hint = pattern(one.hint, one.scope)
        hint = "" if re.fullmatch(r"(\{[^{}]*\}[:; /]*)*", hint) else hint
        area = _AREAS.get(one.file.split("/")[0], _LIBRARY)
        cls: type[HorizonError] = CLASSES[one.name]
        row = f"| {_cell(message)} | {_cell(hint) or 'depends on the case'} |"
        rows.setdefault((cls.exit_code, area), {})[row] = None
    return _ERRORS + "\n".join(_error_lines(rows)) + "\n"


def _error_lines(rows: dict[tuple[int, str], dict[str, None]]) -> Iterator[str]:
    for code in sorted({code for code, _ in rows}):
        yield from ("", f"## {code}: {_CODES[code]}")
        for area in [*_AREAS.values(), _LIBRARY]:
            if (code, area) in rows:
                yield from ("", f"### {area}", "", "| error | hint |", "| --- | --- |", *rows[code, area])


def _cell(text: str) -> str:
    """Return a pattern as a cell of a table, its placeholders in italics."""
    parts = re.split(r"(`[^`{}|]*`)", " ".join(text.split()))
    return "".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([*|`\\]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return re.sub(r"\{([^{}]*)\}", r"<i>\1</i>", text)


PAGES = {
    "docs/configuration.md": markdown,
    "docs/reference/commands.md": commands,
    "docs/reference/errors.md": errors,
}


if __name__ == "__main__":
    for place, write in PAGES.items():
        (ROOT / place).write_text(write(), encoding="utf-8")
        print(f"written: {place}")
