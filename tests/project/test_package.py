"""What pip installs: each import is declared, all files are packed, the version has one place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import horizon_lm
from horizon_lm.report import metrics
from horizon_lm.version import VERSION

ROOT = Path(__file__).parents[2]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "src/horizon_lm").rglob("*.py")}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Names to import, if they are not the distribution's own with underscores.
MODULES = {"pyyaml": "yaml", "pillow": "PIL", "pydantic_core": "pydantic"}
NOT_IN_THE_CODE = {
    "vllm": "TRL's trainers import it",
    "torchvision": "transformers' image processors import it",
    "triton": "torch for CUDA brings it along",
}


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()  # type: ignore[index]


def module(requirement: str) -> str:
    name = distribution(requirement)
    return MODULES.get(name, name.replace("-", "_"))


def imported(sources: Iterable[str]) -> set[str]:
    """Return the modules that source code imports, packages of other people only."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if function in ("import_module", "find_spec"):
                    found.add(str(node.args[0].value).split(".")[0])
    found = {MODULES.get(name, name) for name in found}
    return {name for name in found if name and name not in {*sys.stdlib_module_names, "horizon_lm"}}


def undeclared(sources: Iterable[str], requirements: Iterable[str]) -> set[str]:
    return imported(sources) - {module(requirement) for requirement in requirements}


def unused(sources: Iterable[str], requirements: Iterable[str]) -> set[str]:
    return {module(requirement) for requirement in requirements} - imported(sources)


def of_users() -> list[str]:
    """Return the requirements of all extras but those of developers."""
    found = [line for name, lines in EXTRAS.items() if name not in ("dev", "docs") for line in lines]
    return [line for line in found if not line.startswith("horizon-lm[")]


def test_what_is_imported_is_declared() -> None:
    declared = [*PROJECT["dependencies"], *of_users()]
    # torch for CUDA brings triton, and a kernel of Jupyter has IPython.
    assert undeclared(SOURCES.values(), declared) <= {"triton", "IPython"}


def test_what_is_declared_is_imported() -> None:
    assert not unused(SOURCES.values(), PROJECT["dependencies"])


def test_what_an_extra_installs_is_named_in_the_code() -> None:
    text = "\n".join(SOURCES.values())
    for requirement in of_users():
        name = distribution(requirement)
        assert name in NOT_IN_THE_CODE or re.search(rf"\b{module(requirement)}\b", text), name


def test_the_checks_of_imports_see_what_is_wrong() -> None:
    """The negative control: an import without a dependency, and a dependency without an import."""
    source = (
        "import os, yaml.nodes\nfrom PIL import Image\nfind_spec('a')\nimportlib.import_module('b.c')\n"
        "from horizon_lm import x\nfrom . import y\nimport_module(name)\n"
    )
    assert imported([source]) == {"yaml", "PIL", "a", "b"}
    assert undeclared([source], ["PyYAML>=6", "b"]) == {"PIL", "a"}
    assert unused([source], ["PyYAML>=6", "pillow", "numpy>=2"]) == {"numpy"}


def test_there_are_the_extras_that_users_type() -> None:
    assert {"peft", "vision", "kernels", "vllm", "trackers", "dev", "lowbit", "hub", "liger"} <= EXTRAS.keys()
    assert {"tensorboard", "trackio", "wandb", "mlflow", "comet_ml"} <= EXTRAS.keys()
    joined = [name for lines in EXTRAS.values() for line in lines for name in of_ourselves(line)]
    assert set(joined) <= EXTRAS.keys() and {"liger", "wandb"} <= set(joined)


def of_ourselves(requirement: str) -> list[str]:
    found = re.fullmatch(r"horizon-lm\[(.*)\]", requirement)
    return found[1].split(",") if found else []


def needing_newer_python(requires: Mapping[str, str | None], python: str) -> set[str]:
    """Return the packages whose Requires-Python excludes `python`."""
    return {name for name, range_ in requires.items() if range_ and not SpecifierSet(range_).contains(python)}


def test_pinned_versions_install_on_the_oldest_python_of_a_distribution() -> None:
    """Debian 12 has Python 3.11.2; a pin that needs 3.11.5 makes `make quickstart` fail there."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    requires = {}
    for name, version in pins:
        with suppress(PackageNotFoundError):
            if (found := metadata(name))["Version"] == version:
                requires[name] = found["Requires-Python"]
    assert len(requires) > 60  # most of the pins are installed where tests run
    assert not needing_newer_python(requires, "3.11.2")
    assert needing_newer_python({"a": ">=3.11.5", "b": ">=3.11", "c": None}, "3.11.2") == {"a"}


def test_the_extras_that_pages_and_hints_name_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    text = "\n".join([*(page.read_text() for page in pages), *SOURCES.values()])
    assert extras_in(text) <= EXTRAS.keys() and "liger" in extras_in(text)
    assert extras_in("pip install '.[ligre]' 'horizon-lm[hub,x]'") == {"ligre", "hub", "x"}  # the control


def extras_in(text: str) -> set[str]:
    """Return the extras that commands install, as `.[liger]` or `horizon-lm[liger]`."""
    found = re.findall(r"(?:horizon-lm|(?<=[\s'\"])\.)\[([\w,-]+)\]", text)
    return {name for names in found for name in names.split(",")}


def test_the_version_has_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a source tree that was never installed, where no metadata exists."""
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert horizon_lm.__version__ == VERSION and re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    written = [name for name, text in SOURCES.items() if f'"{VERSION}"' in text]
    assert written == ["src/horizon_lm/version.py"]

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(metrics, "version", absent)
    metrics._installed.cache_clear()
    try:
        assert metrics.versions()["horizon-lm"] == VERSION
    finally:
        metrics._installed.cache_clear()


def not_packed(files: Iterable[str], patterns: Mapping[str, list[str]]) -> list[str]:
    return [name for name in files if not any(fnmatch(name, p) for p in patterns["horizon_lm"])]


def test_every_file_of_the_package_is_packed() -> None:
    """`examples` is a link to configs/, through which the files come."""
    package = ROOT / "src/horizon_lm"
    others = [
        str(path.relative_to(package))
        for folder in (package, *(p for p in package.rglob("*") if p.is_dir()))
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".py", ".so", ".pyc")
    ]
    shipped = [name for name in others if name.startswith("config/examples/")]
    assert len(shipped) == len(list((ROOT / "configs").iterdir())) >= 10
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert not not_packed(others, tool["package-data"])
    assert not_packed(["report/page.css"], tool["package-data"]) == ["report/page.css"]  # the control


def test_a_change_of_any_c_source_builds_the_kernel_again() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"csrc/{path.name}"' in setup for path in (ROOT / "csrc").iterdir())
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()  # headers are in the sdist


def test_the_page_of_the_package_is_complete() -> None:
    assert PROJECT["readme"] == "README.md" and PROJECT["license"] == "Apache-2.0"
    assert PROJECT["authors"] == [{"name": "The Horizon-LM authors"}]
    pythons = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert pythons == {"3.11", "3.12", "3.13"} and PROJECT["requires-python"] == ">=3.11"
    assert all(url.startswith("https://arxiv.org/abs/") for url in PROJECT["urls"].values())
