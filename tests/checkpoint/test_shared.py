"""All ranks must see one folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from horizon_lm.checkpoint import shared
from horizon_lm.checkpoint.shared import shared_folder
from horizon_lm.distributed.ranks import ALONE
from horizon_lm.errors import ConfigError
from threaded_ranks import ThreadedRanks, on_ranks


def test_a_folder_that_all_see_is_left_as_it_was(tmp_path: Path) -> None:
    on_ranks(3, lambda ranks: shared_folder(ranks, tmp_path))
    assert not list(tmp_path.iterdir())
    shared_folder(ALONE, tmp_path / "absent")  # one rank need not look


def test_a_folder_of_another_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all ranks, with the rank and the node that see another one."""
    monkeypatch.setattr(shared, "_PATIENCE_SECONDS", 0.2)
    here = threading.local()
    monkeypatch.setattr(shared.socket, "gethostname", lambda: here.node)
    for rank in range(3):
        (tmp_path / f"disk of {rank == 2}").mkdir(exist_ok=True)
    said = []

    def work(ranks: ThreadedRanks) -> None:
        here.node = f"node{ranks.rank // 2}"
        with pytest.raises(ConfigError, match="rank 2 does not see what rank 0 on node0 writes") as error:
            shared_folder(ranks, tmp_path / f"disk of {ranks.rank == 2}")
        said.append(error.value)

    on_ranks(3, work)
    assert len(said) == 3 and all("another folder on node1" in error.message for error in said)
    assert all("all nodes share" in (error.hint or "") for error in said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_rank_0_cannot_use_fails_on_all(tmp_path: Path) -> None:
    def work(ranks: ThreadedRanks) -> None:
        with pytest.raises(ConfigError, match="rank 0 cannot write to .*absent: No such file or directory"):
            shared_folder(ranks, tmp_path / "absent")

    on_ranks(2, work)


def test_a_file_may_become_visible_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, False, False])
    honest = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: next(looks, None) is None and honest(self))
    on_ranks(2, lambda ranks: shared_folder(ranks, tmp_path))
    assert next(looks, None) is None
