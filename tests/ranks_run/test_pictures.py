"""Pictures on several ranks: features computed together, with and without a cache, and the bits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from picture_runs import settings
from rank_runs import write_settings
from rank_server import RankServer
from rank_states import exported, logical_state
from sizes import SOAK


@pytest.mark.parametrize("is_cached", [True, False] if SOAK else [False])
def test_pictures_on_any_number_of_ranks(is_cached: bool, server: RankServer, tmp_path: Path) -> None:
    found: dict[int, Any] = {}
    for world in (1, 2):
        run = tmp_path / f"on-{world}"
        cache = str(tmp_path / f"cache-{world}") if is_cached else None
        changes = {"gradient_accumulation_steps": 2, "reduction": "exact", "save_steps": 3}
        config = settings(tmp_path, output_dir=str(run), dataset_cache_dir=cache, **changes)
        ended = server.run(world, ["train", str(write_settings(config, tmp_path / f"{world}.yaml"))])
        assert ended.codes == [0] * world, ended.said()
        assert "features of 8 pictures, 8 of them computed now" in ended.outputs[0]
        assert not any(ended.outputs[1:]) and not any(ended.errors[1:]), ended.said()
        found[world] = logical_state(run / "checkpoint-3"), exported(run / "model")
        assert bool(list(tmp_path.glob(f"cache-{world}/pictures/*/*.safetensors"))) is is_cached
    assert found[2] == found[1]
