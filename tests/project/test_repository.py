"""Workflows, forms and pages for contributors parse, and name what exists."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from horizon_lm.version import VERSION

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [ROOT / f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature")]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def make_targets(commands: Iterable[str]) -> set[str]:
    """Return the targets that lines `make ...` name, without variables."""
    lines = [line.strip() for command in commands for line in command.splitlines()]
    found = {word for line in lines if line.startswith("make ") for word in _words(line)}
    return {word for word in found if "=" not in word}


def _words(line: str) -> list[str]:
    bare = re.sub(r"\S+='[^']*'", "", line.split("#")[0])
    return bare.split()[1:]


def test_the_workflows_are_there() -> None:
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "newest", "wheels"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_names_what_exists_and_asks_for_little(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and job.get("permissions", {}).keys() <= {"id-token"}
    for step in steps(workflow):
        if "uses" in step:
            action, version = step["uses"].split("@")
            assert re.fullmatch(r"v\d+|release/v\d+", version), step["uses"]
            assert action.split("/")[0] in ("actions", "pypa")
            if action == "actions/checkout":
                assert step["with"]["persist-credentials"] is False
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    for name in re.findall(r"^\.ci/\S+", "\n".join(commands), re.M):
        assert (ROOT / name).is_file()
    assert make_targets(commands) <= TARGETS


def test_the_pythons_are_those_of_the_classifiers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pythons = [
        line.rsplit(" ", 1)[1] for line in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)
    ]
    assert read(ROOT / ".github/workflows/ci.yml")["jobs"]["check"]["strategy"]["matrix"]["python"] == pythons
    wheels = project["tool"]["cibuildwheel"]
    assert wheels["build"].split() == [f"cp{python.replace('.', '')}-*" for python in pythons]
    assert wheels["test-command"].split("{project}/")[1] == ".ci/check-wheel"
    assert (ROOT / ".ci/check-wheel").is_file() and (ROOT / ".ci/check-wheel").stat().st_mode & 0o111


def test_make_setup_takes_the_python_of_a_matrix() -> None:
    def recipe(*words: str) -> str:
        command = ["make", "-n", "setup", "VENV=/nowhere/venv", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "for python in python3.13;" in recipe("BASE_PYTHON=python3.13")
    assert "for python in python3.11 python3.12 python3;" in recipe()
    assert "-c constraints.txt" in recipe() and "-c " not in recipe("CONSTRAINTS=").split("pip install")[1]


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md"])
def test_a_command_for_contributors_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^    (make [^\n]*)$", text, re.M)
    inline = re.findall(r"`(make[^`]*)`", text)
    named = make_targets([*blocks, *inline])
    assert {"setup", "test", "lint", "types", "format"} <= named <= TARGETS
    files = re.findall(r"`((?:[a-z_]+/)+[\w.-]+)`", text)
    known = [ROOT, ROOT / "src/horizon_lm"]
    assert len(files) >= 6 and not [name for name in files if not any((k / name).exists() for k in known)]


def test_an_unknown_target_is_found() -> None:
    """The negative control."""
    assert make_targets(["make nothing ARGS='-k data'  # a comment", "pip install x"]) - TARGETS == {
        "nothing"
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.name)
def test_a_form_asks_for_env_and_doctor(form: Path) -> None:
    fields = {field["id"]: field for field in read(form)["body"]}
    for verb in ("env", "doctor"):
        assert f"`horizon {verb}`" in fields[verb]["attributes"]["description"]
    required = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert required >= ({"what", "env", "doctor"} if form.stem == "bug" else {"task"})


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == VERSION and citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software" and citation["license"] == "Apache-2.0"
    assert [entry["url"][-10:] for entry in citation["references"]] == ["2602.04816", "2604.05091"]
    assert "doi" not in citation and "repository-code" not in citation  # there is none yet


def test_pre_commit_runs_the_commands_of_make() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "rooms", "mypy"}
    for hook in hooks:
        words = hook["entry"].replace(" --force-exclude", "").split()
        assert words[0] == ".venv/bin/python" and " ".join(words[1:]) in makefile
    assert {repo["repo"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]} == {"local"}


def test_a_pull_request_is_asked_about_numerics() -> None:
    text = (ROOT / ".github/pull_request_template.md").read_text()
    assert "bitwise identical" in text and "Baseline" in text and "CONTRIBUTING.md#the-numerics-rule" in text
    assert re.search(r"^## The numerics rule$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
