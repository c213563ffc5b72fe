"""The errors for users that the source builds: class, message and hint of each, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from horizon_lm import errors
from horizon_lm.errors import HorizonError

SOURCES = Path(__file__).parents[1] / "src" / "horizon_lm"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, HorizonError)
}


class Raised(NamedTuple):
    """One place that builds an error. message, hint: None if they are not given."""

    file: str
    line: int
    name: str
    message: ast.expr | None
    hint: ast.expr | None
    scope: ast.AST


def raised(text: str, file: str = "") -> Iterator[Raised]:
    """Yield the errors that a module builds from a message, in order; not those it builds from `*args`."""
    tree, found = ast.parse(text), []
    for node, scope in _with_scopes(tree, tree):
        if not isinstance(node, ast.Call) or not node.args or isinstance(node.args[0], ast.Starred):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        hints = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "hint")]
        hint = hints[0] if hints else None
        if isinstance(hint, ast.Constant) and hint.value is None:
            hint = None
        if name in CLASSES:
            found.append(Raised(file, node.lineno, name, node.args[0], hint, scope))
    yield from sorted(found, key=lambda one: one.line)


def _with_scopes(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield what is in a module or function, each with the innermost function that it is in."""
    yield node, scope
    inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope
    for child in ast.iter_child_nodes(node):
        yield from _with_scopes(child, inner)


def all_raised() -> Iterator[Raised]:
    """Yield every error that the package builds, by file and line."""
    for path in sorted(SOURCES.rglob("*.py")):
        yield from raised(path.read_text(encoding="utf-8"), path.relative_to(SOURCES).as_posix())


def pattern(node: ast.expr | None, scope: ast.AST) -> str:
    """Return a text as its author wrote it, with {name} for each value that is filled in."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part, scope) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        is_constant = isinstance(node.value, ast.Name) and node.value.id in _constants()
        return pattern(node.value, scope) if is_constant else _filled(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left, scope) + pattern(node.right, scope)
    if isinstance(node, ast.IfExp):
        return f"{pattern(node.body, scope)} / {pattern(node.orelse, scope)}"
    if isinstance(node, ast.BoolOp):
        return " / ".join(pattern(value, scope) for value in node.values)
    if isinstance(node, ast.Name):
        if node.id in _constants():
            return _constants()[node.id]
        texts = [pattern(value, scope) for value in _assigned(node.id, scope)]
        return " / ".join(dict.fromkeys(texts)) or _filled(node)
    return _filled(node)


def _assigned(name: str, scope: ast.AST) -> list[ast.expr]:
    """Return the texts that a function assigns to a name."""
    texts = ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp
    return [
        node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, texts)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]


@cache
def _constants() -> dict[str, str]:
    """Return the texts that modules of the package give to names in capitals."""
    found: dict[str, str] = {}
    for path in SOURCES.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                name, value = getattr(node.targets[0], "id", ""), node.value.value
                if name.isupper() and isinstance(value, str):
                    found[name] = value
    return found


def _filled(node: ast.expr) -> str:
    """Name a value: {rows} for `rows`, `self.rows`, `len(rows)`, `', '.join(rows)`; {n} rows for a count."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.IfExp(body=ast.Constant(value=str(yes)), orelse=ast.Constant(value=str(no))):
            return yes if not no else no if not yes else f"{yes}/{no}"
        case ast.Call(func=ast.Name(id="count"), args=[number, ast.Constant(value=noun), *plural]):
            return f"{_filled(number)} {_filled(plural[0]) if plural else f'{noun}s'}"
        case ast.Call(args=[ast.Name() | ast.Attribute() | ast.Call() | ast.Subscript() as first, *_]):
            return _filled(first)
        case ast.Call(func=ast.Attribute(value=value)) if not isinstance(value, ast.Constant):
            return _filled(value)
    skipped = {"self", "join", "for", "in", "if", "else", "not", "and", "or", "repr"}
    words = re.findall(r"(?<!['\"])\b[a-zA-Z]\w*", ast.unparse(node))
    names = [word for word in words if word not in skipped]
    if not names:
        return "{...}"
    return "{" + (names[-1] if isinstance(node, ast.Attribute) else names[0]) + "}"
