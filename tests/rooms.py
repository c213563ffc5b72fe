"""The rooms of the package, their size and the imports between them: `make map`.

Imports run one way, from a later line of `ORDER` to an earlier one; imports inside functions and for types
count like all others. `python -m tests.rooms` prints the map and exits with 1 for an import that runs
the wrong way, a room without a place in `ORDER`, a ring of modules, or a relative import.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "horizon_lm"

# From the ground up. A room (a folder, or a module at the top) imports from itself and from lines above.
ORDER = (
    ("text", "words", "version"),
    ("errors",),
    ("io",),
    ("config",),
    ("picture_batches",),
    ("micro_batches",),
    ("machine",),
    ("distributed",),
    ("schedule",),
    ("memory",),
    ("model",),
    ("optim",),
    ("engine",),
    ("data",),
    ("checkpoint",),
    ("outputs",),
    ("host_model",),
    ("preference",),
    ("plan",),
    ("report",),
    ("training",),
    ("trainers",),
    ("__init__",),  # the package's own face
    ("bench",),
    ("cli",),
    ("__main__",),
)
PURE = ("schedule",)  # rooms that must not import torch


@dataclass(frozen=True)
class Import:
    """One import of a module by another; names are dotted, without the package's own."""

    source: str
    target: str
    line: int


@dataclass(frozen=True)
class House:
    """What the files of a package say: lines of each module, imports between them, faults of single files."""

    lines: Mapping[str, int]
    imports: tuple[Import, ...]
    faults: tuple[str, ...]


def room(module: str) -> str:
    return module.partition(".")[0]


def read(package: Path) -> House:
    """Parse every file of the package."""
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    lines, imports, faults = {}, [], []
    for module, path in files.items():
        text = path.read_text(encoding="utf-8")
        lines[module] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                faults.append(f"{module}:{node.lineno}: relative import")
            for name in _imported(node, package.name):
                target = _module(name, files)
                if target != module:
                    imports.append(Import(module, target, node.lineno))
            if room(module) in PURE and any(n.split(".")[0] == "torch" for n in _names(node)):
                faults.append(f"{module}:{node.lineno}: imports torch")
    return House(lines, tuple(imports), tuple(faults))


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _names(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement mentions: of each name, the module and the name in it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    for name in _names(node):
        head, _, rest = name.partition(".")
        if head == package:
            yield rest or "__init__"


def _module(name: str, files: Mapping[str, Path]) -> str:
    """The module that holds `name`, or is it."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or "__init__"


def faults(house: House) -> list[str]:
    """What is against the order, one line each."""
    rank = {name: place for place, names in enumerate(ORDER) for name in names}
    found = list(house.faults)
    found += [f"{name}: not in ORDER" for name in sorted({room(m) for m in house.lines} - set(rank))]
    for each in house.imports:
        source, target = room(each.source), room(each.target)
        if source != target and rank.get(source, 0) <= rank.get(target, 0):
            found.append(f"{each.source}:{each.line}: imports {each.target}, which comes later or beside it")
    graph: dict[str, set[str]] = defaultdict(set)
    for each in house.imports:
        graph[each.source].add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("ring: " + " -> ".join(error.args[1]))
    return found


def draw(house: House) -> str:
    """Rooms from the ground up with files, lines, and the rooms that each imports (how many times)."""
    files = Counter(room(module) for module in house.lines)
    lines: Counter[str] = Counter()
    for module, number in house.lines.items():
        lines[room(module)] += number
    uses: dict[str, Counter[str]] = defaultdict(Counter)
    for each in house.imports:
        if room(each.source) != room(each.target):
            uses[room(each.source)][room(each.target)] += 1
    rows = [f"{'room':14}{'files':>6}{'lines':>8}  imports"]
    for name in (name for names in ORDER for name in names if name in files):
        used = ", ".join(f"{target} {number}" for target, number in uses[name].most_common())
        rows.append(f"{name:14}{files[name]:6}{lines[name]:8,}  {used}")
    rows.append(f"{'all':14}{sum(files.values()):6}{sum(lines.values()):8,}")
    return "\n".join(rows)


def main() -> int:
    house = read(PACKAGE)
    if "--quiet" not in sys.argv[1:]:
        print(draw(house))
    found = faults(house)
    print("\n".join(found) if found else "no ring, no import that runs the wrong way")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
