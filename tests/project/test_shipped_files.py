"""Every configuration in configs/ is valid, and what README and docs name exists and is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from horizon_lm.cli import app
from horizon_lm.cli.run import split_arguments
from horizon_lm.config import DatasetConfig, TrainConfig, load_config
from horizon_lm.config.aliases import ALIASES, DROPPED, ENTRY_ALIASES, UNAVAILABLE
from horizon_lm.data.sources import check_exists
from horizon_lm.training.eval_command import target_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    text = path.read_text()
    needed = ["model_name_or_path=some/model"] if "model_name_or_path: null" in text else []
    needed += ["datasets=some.jsonl"] if "datasets: []" in text else []
    config, notes = load_config(path, needed)
    assert config and not notes  # our own names throughout


def test_there_is_a_configuration_for_each_task() -> None:
    tasks = {
        "quickstart",
        "pretrain",
        "continued_pretrain",
        "sft",
        "sft_alpaca",
        "sft_sharegpt",
        "dpo",
        "kto",
        "lora",
        "vision_sft",
    }
    assert {path.stem for path in CONFIGS} >= tasks


def test_the_data_of_the_offline_configurations_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("quickstart", "sft", "lora", "dpo", "kto"):
        config = TrainConfig.from_yaml(f"configs/{name}.yaml")
        for dataset in [*config.datasets, *config.eval_datasets]:
            check_exists(dataset)
    assert TrainConfig.from_yaml("configs/sft.yaml").model_name_or_path == "runs/quickstart/model"


def test_each_key_of_a_configuration_has_its_comment() -> None:
    for path in CONFIGS:
        for line in path.read_text().splitlines():
            if re.match(r"\s*[a-z_]+:", line):
                assert "#" in line, f"{path.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:tests|docs|configs|benchmarks|examples)/[\w./-]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [link for link in links if not (page.parent / link).exists()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)`", text)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_names_modules_that_exist(page: Path) -> None:
    package = ROOT / "src" / "horizon_lm"
    rooms = "|".join(sorted(p.name for p in package.iterdir() if p.is_dir()))
    named = re.findall(rf"`((?:(?:{rooms})/)?[a-z_]+\.py)`", page.read_text())
    assert not [name for name in named if not (package / name).exists()]


def test_links_to_sections_lead_somewhere() -> None:
    for page in PAGES:
        for link, section in re.findall(r"\]\(([\w./-]+\.md)#([\w-]+)\)", page.read_text()):
            titles = re.findall(r"^#+ (.*)$", (page.parent / link).read_text(), re.M)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def commands() -> list[str]:
    """Return commands within sentences, and those in blocks of pages that test_documented.py does not run."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        if page.name in ("lab.md", "benchmarking.md", "configuration.md"):
            found += re.findall(r"^    (horizon .*)$", text, re.M)
        found += re.findall(r"`(horizon [^`]*[=/][^`]*)`", text.replace("\n  ", " "))
    return sorted({re.split(r"\s{2,}#|\s&&", command)[0].strip() for command in found if "[" not in command})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, verb, *rest = shlex.split(command)
    if verb == "data":
        assert rest.pop(0) == "preview"
        if "--images" in rest:
            del rest[(at := rest.index("--images")) : at + 2]
    if verb not in ("train", "eval", "data", "plan"):
        assert verb in {command.name or command.callback.__name__ for command in app.registered_commands} | {
            "config"
        }
        return
    of_plan = ("hardware=", "nodes=", "gpus_per_node=") if verb == "plan" else ()
    rest = [word for word in rest if word not in ("--dry-run", "--json") and not word.startswith(of_plan)]
    if "--help" in rest:
        return
    file, overrides = split_arguments(rest)
    if verb == "eval" and file is None:
        target, _ = target_of(file, overrides)
        assert target.config.eval_datasets and target.config.model_name_or_path
        return
    if file is not None and not file.startswith("configs/"):
        places = ("RUN", "RUN/checkpoint-500", "MODEL") if verb == "eval" else ()
        assert file in ("run.yaml", "CONFIG.yaml", "CONFIG", *places)
        given = {override.removeprefix("--").partition("=")[0] for override in overrides}
        overrides += [f"{key}=X" for key in ("model_name_or_path", "datasets") if key not in given]
        file = None
    assert load_config(file, overrides)[0]


# ---- docs/coming-from.md --------------------------------------------------------------------


def rows() -> list[tuple[str, str, str]]:
    text = (ROOT / "docs" / "coming-from.md").read_text()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [(row[0], row[1], row[2]) for row in cells if "---" not in row[0] and "`" in row[0]]


@pytest.mark.parametrize(("theirs", "ours", "how"), rows())
def test_a_row_of_the_table_is_true(theirs: str, ours: str, how: str) -> None:
    """`same`: their key is ours. `read`: it is an alias of ours. Else ours exists all the same."""
    keys = re.findall(r"`([a-z_0-9]+)`", theirs)
    key = re.match(r"`([a-z_]+)", ours)
    if key is not None:
        assert key[1] in TrainConfig.model_fields
        for inner in re.findall(r"(\w+): \.\.\.", ours):
            assert inner in DatasetConfig.model_fields
    if how.startswith("same"):
        assert all(
            theirs_key in {**TrainConfig.model_fields, **DatasetConfig.model_fields} for theirs_key in keys
        )
    elif how.startswith("read") and "entry" in theirs:
        assert re.match(r"`(\w+)", theirs)[1] in ENTRY_ALIASES  # type: ignore[index]
    elif how.startswith("read"):
        assert key is None or ALIASES[keys[0]].key == key[1]
        assert key is not None or keys[0] in DROPPED
    elif "leave it out" in how or "moved into the entry" in how:
        assert keys[0] in UNAVAILABLE


def test_the_table_is_long_enough() -> None:
    assert len(rows()) >= 50
