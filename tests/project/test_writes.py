"""Nothing in the source writes but by the functions of one module."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

import horizon_lm

SOURCE = Path(horizon_lm.__file__).parent

_PLAIN_FLAGS = {"O_RDONLY", "O_DIRECTORY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"}
_WRITERS = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "tofile", "savefig"),
    *("save_pretrained", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"),
    *("SummaryWriter", "save_to_disk", "memmap", "export_chrome_trace"),
}
_OF_OS = {"replace", "rename", "renames", "link", "symlink", "truncate", "mkfifo", "mknod"}
_OF_SHUTIL = {"copy", "copy2", "copyfile", "copytree", "move"}
_STAGED_FOLDER = "fills a folder that was staged, and is renamed"
_OWN_FOLDER = "makes a new file or folder, of a name that nobody knows"
# (module, call) -> why it may write by itself.
ALLOWED = {
    ("io/files.py", "*"): "the functions",
    ("checkpoint/disk.py", "os.open"): "new files in a new folder, O_EXCL and O_NOFOLLOW",
    ("model/adapters.py", "save_pretrained"): _STAGED_FOLDER,
    ("model/adapters.py", "shutil.move"): _STAGED_FOLDER,
    ("io/leftovers.py", "mkdtemp"): _OWN_FOLDER,
    ("io/leftovers.py", "os.open"): "the lock file in such a folder; O_NOFOLLOW where it is another's",
    ("checkpoint/export.py", "mkdtemp"): _OWN_FOLDER,
    ("checkpoint/export.py", "save_pretrained"): _STAGED_FOLDER,
    ("training/finish.py", "save_pretrained"): _STAGED_FOLDER + ", or is written by such a function",
    ("training/checkpoint_series.py", "save_pretrained"): "fills a temporary folder",
    ("report/plot.py", "savefig"): "writes into a file that `files` opened",
    ("data/tokens.py", "memmap"): "mode r",
    ("plan/rates.py", "TemporaryFile"): "has no name",
    ("io/output.py", "os.open"): "/dev/null",
    ("io/output.py", "open"): "/dev/null",
    ("data/pictures.py", "open"): "PIL reads bytes in memory",
    ("data/processor.py", "save_pretrained"): _STAGED_FOLDER + ", or a temporary one",
    ("data/encode.py", "save_pretrained"): "fills a temporary folder",
    ("trainers/view.py", "save_pretrained"): "calls that of HostModel",
    ("trainers/checkpoints.py", "save_pretrained"): "calls that of HostModel",
    ("trainers/checkpoints.py", "os.replace"): "puts files of a staged model in place, over a link",
    ("bench/worker.py", "fdopen"): "standard output",
    ("bench/jobs.py", "TemporaryFile"): "has no name",
    ("bench/worker.py", "write_text"): "a switch of the kernel, /proc/self/clear_refs",
}


def writes_of(source: str) -> set[str]:
    """The calls in a module that may write a file, by name."""
    found = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        is_method = isinstance(call.func, ast.Attribute)
        name = _last(call.func)
        base = _last(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if (base, name) == ("os", "open"):
            flags = {
                _last(node) for node in ast.walk(call.args[1]) if isinstance(node, ast.Name | ast.Attribute)
            }
            if flags - _PLAIN_FLAGS - {"os"}:
                found.add("os.open")
        elif name in ("open", "fdopen") and base not in ("gzip", "self"):
            if _may_write(call, 0 if is_method and base not in ("os", "io") else 1):
                found.add(name)
        elif base == "os" and name in _OF_OS or base == "shutil" and name in _OF_SHUTIL:
            found.add(f"{base}.{name}")
        elif name in _WRITERS or name == "rename" and "disk" not in base:
            found.add(name)
    return found


def _last(node: ast.expr) -> str:
    """The last part of a name with dots."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _may_write(call: ast.Call, place: int) -> bool:
    """Whether the mode of an `open` is none that reads alone. place: of the mode among the arguments."""
    modes: Sequence[ast.expr] = [k.value for k in call.keywords if k.arg == "mode"] or call.args[
        place : place + 1
    ]
    if not modes:
        return False
    return not isinstance(modes[0], ast.Constant) or bool(set("wax+") & set(str(modes[0].value)))


def test_nothing_writes_by_itself() -> None:
    found = {
        (str(path.relative_to(SOURCE)), name)
        for path in SOURCE.rglob("*.py")
        for name in writes_of(path.read_text())
    }
    found = {("io/files.py", "*") if module == "io/files.py" else (module, name) for module, name in found}
    assert found - ALLOWED.keys() == set(), "write by horizon_lm.io.files, or say here why not"
    assert ALLOWED.keys() - found == set(), "these are gone"


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('rb+')",
        "path.open(mode)",
        "os.fdopen(file, 'w')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.open(path, flags)",
        "path.write_text('a')",
        "os.replace(a, b)",
        "path.rename(b)",
        "shutil.copy(a, b)",
        "tempfile.NamedTemporaryFile()",
        "array.tofile(path)",
        "figure.savefig(path)",
        "tokenizer.save_pretrained(folder)",
    ],
)
def test_the_look_at_the_source_sees_writes(line: str) -> None:
    assert len(writes_of(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["open(path)", "path.open('rb')", "text.replace('a', 'b')", "os.open(path, os.O_RDONLY | os.O_CLOEXEC)"],
)
def test_the_look_at_the_source_passes_what_reads(line: str) -> None:
    assert not writes_of(line)
