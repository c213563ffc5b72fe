"""The house: imports between rooms run one way, without a ring. `make map` draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tests.rooms import ORDER, PACKAGE, draw, faults, read


def test_imports_run_one_way_and_form_no_ring() -> None:
    house = read(PACKAGE)
    assert len(house.imports) > 500 and len(house.lines) > 100  # the files were found and read
    assert faults(house) == []


def test_the_map_names_every_room() -> None:
    house = read(PACKAGE)
    drawn = draw(house)
    assert all(name in drawn for name in ("io", "config", "schedule", "engine", "training", "cli"))
    assert f"{sum(house.lines.values()):,}" in drawn


def _package(folder: Path, **files: str) -> Path:
    """A small package; `engine__engine="..."` is engine/engine.py."""
    package = folder / "small"
    for name, text in files.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"io__a": "from small.cli import b", "cli__b": ""}, "imports cli.b, which comes later"),
        ({"io__a": "def f():\n    from small.cli.b import c", "cli__b": ""}, "io.a:2: imports cli.b"),
        (
            {"io__a": "if TYPE_CHECKING:\n    from small.cli import b", "cli__b": ""},
            "io.a:2: imports cli.b",
        ),
        ({"io__a": "import small.cli.b", "cli__b": ""}, "imports cli.b"),
        ({"io__a": "from small.io.b import x", "io__b": "from small.io import a"}, "ring: "),
        ({"io__a": "from .b import x", "io__b": ""}, "io.a:1: relative import"),
        ({"shed__a": ""}, "shed: not in ORDER"),
        ({"schedule__a": "def f():\n    import torch.nn"}, "schedule.a:2: imports torch"),
        ({"schedule__a": "from torch import Tensor"}, "schedule.a:1: imports torch"),
    ],
)
def test_what_is_against_the_order_is_found(tmp_path: Path, files: dict[str, str], said: str) -> None:
    found = faults(read(_package(tmp_path, **files)))
    assert len(found) == 1 and said in found[0], found


def test_what_follows_the_order_is_not(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        io__a="from small.text import x",
        text="",
        cli__b="def f():\n    from small.io.a import x",
        engine__c="import torch",
    )
    assert faults(read(package)) == []


def test_each_room_has_one_place() -> None:
    names = [name for names in ORDER for name in names]
    assert len(names) == len(set(names))


# Public interfaces: one call of the library, and commands whose parameters are their options.
PUBLIC = {"host_model.train_step", "host_model.evaluate"}
KERNELS = {"optim.device_kernel.update_kernel"}  # Triton takes pointers and numbers one by one
MANY_PARAMETERS = {
    *PUBLIC,
    *KERNELS,
    "cli.model.generate",
    "cli.model.chat",
    "cli.bench.bench",
    "cli.run.export",
}


def crowded(source: str) -> list[str]:
    """Names of functions with more than six parameters besides self or cls."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len(given) - bool(given and given[0].arg in ("self", "cls")) > 6:
                found.append(node.name)
    return found


def test_functions_take_six_parameters_at_most() -> None:
    found = {
        ".".join([*path.relative_to(PACKAGE).with_suffix("").parts, name])
        for path in PACKAGE.rglob("*.py")
        for name in crowded(path.read_text(encoding="utf-8"))
    }
    assert found == MANY_PARAMETERS


def test_a_function_with_seven_is_found() -> None:
    assert crowded("def f(a, b, c, d, e, *, f, g): ...") == ["f"]
    assert crowded("class A:\n    def f(self, a, b, c, d, e, f): ...") == []
