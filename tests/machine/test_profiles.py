"""Shipped machine profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from horizon_lm.errors import ConfigError
from horizon_lm.machine.profile import load_profile, read_profile, shipped

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_figure_of_a_shipped_profile_has_a_source(tmp_path: Path) -> None:
    names = shipped()
    assert {"a100-pcie", "h100-pcie", "h100-sxm", "h200-1.5tb", "gh200"} <= set(names)
    assert {"rtx3090", "rtx4090", "rtx5090", "cpu-2core"} <= set(names)
    for name in names:
        profile = load_profile(name)
        assert profile.name == name and not profile.measured
        assert all(len(text) > 3 for text in profile.sources.values())
    text = load_profile("gh200").to_yaml()
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert load_profile(str(file)) == load_profile("gh200")
    file.write_text(text.partition("sources:")[0] + "sources: {}\n")
    with pytest.raises(ConfigError, match="no source for"):
        read_profile(file)
    file.write_text(text.replace("h2d:", "h2x:", 1))
    with pytest.raises(ConfigError, match="is not a profile"):
        read_profile(file)
    node = load_profile("h100-sxm").to_yaml()
    file.write_text(node)
    assert load_profile(str(file)) == load_profile("h100-sxm")
    file.write_text(node.replace("    peer: 'NCCL", "    pear: 'NCCL"))
    with pytest.raises(ConfigError, match="no source for node.peer"):
        read_profile(file)
    with pytest.raises(ConfigError, match="neither a profile nor a file"):
        load_profile("h300")
