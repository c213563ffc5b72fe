"""All ranks must see one folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.checkpoint import shared
from horizon_lm.checkpoint.folder import claim
from horizon_lm.checkpoint.shared import shared_folder
from horizon_lm.distributed.ranks import ALONE, Channel
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
    assert len(said) == 3 and all(error.is_shared for error in said)  # rank 0 alone reports it
    assert all("another folder on node1" in error.message for error in said)
    assert all("all nodes share" in (error.hint or "") for error in said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_rank_0_cannot_use_fails_on_all(tmp_path: Path) -> None:
    def work(ranks: ThreadedRanks) -> None:
        with pytest.raises(ConfigError, match="rank 0 cannot write to .*absent: No such file or directory"):
            shared_folder(ranks, tmp_path / "absent")

    on_ranks(2, work)


def test_what_a_kill_leaves_does_not_close_the_folder(tmp_path: Path) -> None:
    """A run may begin in a folder where an earlier one was killed while it looked."""

    class Killed(ThreadedRanks):
        def exchange(self, value: Any, channel: Channel = Channel.MAIN) -> list[Any]:
            if self.is_first and value == ["here", True]:
                left.extend(path.name for path in tmp_path.iterdir())
            return super().exchange(value, channel)

    left: list[str] = []

    def work(ranks: ThreadedRanks) -> None:
        shared_folder(Killed(ranks.rank, ranks.world, ranks._boards), tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.socket, "gethostname", lambda: "here")
        on_ranks(2, work)
    (name,) = left
    (tmp_path / name).touch()
    with claim(str(tmp_path), overwrite=False):
        pass
    (tmp_path / "notes.txt").touch()  # the control
    with pytest.raises(ConfigError, match="not empty"), claim(str(tmp_path), overwrite=False):
        pass


def test_a_file_may_become_visible_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, False, False])
    honest = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: next(looks, None) is None and honest(self))
    on_ranks(2, lambda ranks: shared_folder(ranks, tmp_path))
    assert next(looks, None) is None
