"""Commands and code blocks of the documentation, in the order of the page."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

PROGRAMS = r"horizon|python3?|torchrun|make|sbatch|sky|pip|git|\.|[A-Z]+=\S+"
_PYTHON = r"(?:import|from|with|class|def|for|if|@)\b|[a-z_][\w.]*(?:, \w+)* = |[a-z_][\w.]*\("
_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """kind: command (one line, continued lines joined), python, yaml, diff, rows (JSON), or text (anything
    else, such as output). before: the text of the page above it."""

    page: str
    line: int
    kind: str
    text: str
    before: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str, text: str) -> list[Block]:
    """Return the fenced and the indented blocks of a page of Markdown; of commands, each is a block."""
    found: list[Block] = []
    fenced = [False] * (text.count("\n") + 1)
    for match in _FENCE.finditer(text):
        first, last = (text.count("\n", 0, at) for at in match.span())
        fenced[first : last + 1] = [True] * (last + 1 - first)
        found += _cut(page, first + 1, match[2], match[3].splitlines(), text[: match.start()])
    lines = text.splitlines()
    inside = False
    for number, line in enumerate(lines):
        begins = line.startswith("    ") and not fenced[number] and not (number and lines[number - 1].strip())
        if begins and not inside:
            block = itertools.takewhile(lambda text: text[:4].isspace() or not text, lines[number:])
            code = [text[4:] for text in block]
            above = "\n".join(lines[:number])
            if not re.search(r"^[-*] .*(?:\n\n?(?: .*)?)*\Z", above, re.M):  # else a paragraph of a list
                found += _cut(page, number, "", code, above)
        inside = (begins or inside) and (line[:4].isspace() or not line)
    return sorted(found, key=lambda block: block.line)


def _cut(page: str, line: int, language: str, code: list[str], before: str) -> list[Block]:
    kind = {"python": "python", "py": "python", "yaml": "yaml", "diff": "diff"}.get(language) or _kind(code)
    if language in ("bash", "sh", "shell", "console"):
        kind = "command"
    if kind != "command":
        return [Block(page, line + 1, kind, "\n".join(code).rstrip() + "\n", before)]
    joined = re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines()
    words = [
        command.strip() for command in joined if command.strip() and not command.lstrip().startswith("#")
    ]
    return [Block(page, line + 1 + at, kind, command, before) for at, command in enumerate(words)]


def _kind(code: list[str]) -> str:
    full = [line for line in code if line.strip()]
    first = next((line for line in full if not line.startswith("#")), "")
    if re.match(rf"(?:{PROGRAMS})(?: |$)", first):
        return "command"
    if all(line.startswith(("-", "+", "...", " ")) for line in full) and any(
        line.startswith("+") for line in full
    ):
        return "diff"
    if first.startswith("{"):
        return "rows"
    return "python" if re.match(_PYTHON, first) else "text"


def rows(block: Block) -> list[dict[str, object]]:
    """Parse JSON objects, each of one line or several."""
    decoder, found, rest = json.JSONDecoder(), [], block.text.strip()
    while rest:
        row, end = decoder.raw_decode(rest)
        found.append(row)
        rest = rest[end:].strip()
    return found


def alternatives(command: str) -> list[str]:
    """Write out a synopsis: `A|B` is two commands, `[key=value ...]` none, another `[option]` is given."""
    command = re.sub(r"\s*\[[^\]\s]*=[^\]]*\.\.\.\]", "", command)
    command = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", command)
    parts = [part.split("|") for part in re.split(r"(?<!\S)([A-Z]+(?:\|[A-Z]+)+)(?!\S)", command)]
    return ["".join(choice) for choice in itertools.product(*parts)]
