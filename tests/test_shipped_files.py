"""Every configuration in configs/ is valid, and what the README names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from horizon_lm.config import TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    text = path.read_text()
    needed = ["model_name_or_path=some/model"] if "model_name_or_path: null" in text else []
    needed += ["datasets=some.jsonl"] if "datasets: []" in text else []
    assert TrainConfig.from_yaml(path, needed)


def test_there_are_configurations() -> None:
    assert {p.name for p in CONFIGS} >= {"quickstart.yaml", "pretrain.yaml"}


def test_each_key_of_a_configuration_has_its_comment() -> None:
    for path in CONFIGS:
        for line in path.read_text().splitlines():
            if re.match(r"\s*[a-z_]+:", line):
                assert "#" in line, f"{path.name}: {line}"


def test_the_readme_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    paths = set(re.findall(r"`((?:tests|docs|configs|benchmarks)/[\w./-]+)`", text)) | set(
        re.findall(r"\]\(([\w./-]+)\)", text)
    )
    assert len(paths) >= 6
    assert not [p for p in paths if not (ROOT / p).exists()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)", text)) <= targets
