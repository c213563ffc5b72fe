"""Commands that several ranks were started for: rank 0 does most of them alone, and alone speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from horizon_lm import cli
from horizon_lm.cli import ranks
from horizon_lm.cli.ranks import Place
from horizon_lm.errors import ConfigError, StoppedError


def pretend(patch: pytest.MonkeyPatch, rank: int, world: int = 2, local_rank: int | None = None) -> None:
    patch.setattr("torch.distributed.is_initialized", lambda: False)
    local = rank if local_rank is None else local_rank
    place = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        patch.setenv(name, str(value))


@pytest.mark.parametrize(
    "command", [["version"], ["env"], ["config", "docs"], ["train", "--help"], ["--help"]]
)
def test_rank_0_answers_and_others_do_nothing(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        pretend(monkeypatch, rank)
        assert cli.main(command) == 0
        shown = capsys.readouterr()
        assert bool(shown.out) is (rank == 0) and not shown.err


@pytest.mark.parametrize("command", [["bench"], ["chat", "model"]])
def test_what_several_ranks_would_disturb_is_refused_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        pretend(monkeypatch, rank)
        assert cli.main(command) == 2
        shown = capsys.readouterr().err
        assert (f"horizon {command[0]} was started as 2 ranks" in shown) is (rank == 0)
        assert bool(shown) is (rank == 0)


@pytest.mark.parametrize(
    ("arguments", "takes_part"),
    [
        (["train", "a.yaml"], True),
        (["--debug", "resume", "run"], True),
        (["eval", "model"], True),
        (["train", "a.yaml", "--dry-run"], False),
        (["train", "-h"], False),
        (["plan", "a.yaml"], False),
        (["data", "preview"], False),
        (["export", "run", "out"], False),
        (["generate", "model"], False),
        ([], False),
    ],
)
def test_only_runs_and_evaluations_use_all_ranks(arguments: list[str], takes_part: bool) -> None:
    assert ranks.has_work(arguments, Place(0, 2))
    assert ranks.has_work(arguments, Place(1, 2, 1)) is takes_part


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_fault_in_the_settings_is_told_once_per_node(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ranks of a node read the same file; the first speaks, all exit with 2."""
    pretend(monkeypatch, 5, 8, local_rank)
    assert cli.main(["train", str(tmp_path / "absent.yaml")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("rank 5: error: ") if local_rank == 0 else not shown.err
    assert not shown.out


def test_a_rank_reports_its_own_errors_and_rank_0_all() -> None:
    own, shared, told = StoppedError("a"), ConfigError("b"), ConfigError("c")
    own.is_own = shared.is_shared = told.is_shared = True
    assert [ranks.speaks(error, Place(0, 4)) for error in (own, shared)] == [True, True]
    assert [ranks.speaks(error, Place(3, 4, 3)) for error in (own, shared)] == [True, False]
    assert not ranks.speaks(told, Place(2, 4, 0))


def test_incomplete_variables_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 1)
    monkeypatch.delenv("RANK")
    assert cli.main(["version"]) == 2
    assert "RANK" in capsys.readouterr().err


def test_one_rank_imports_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "horizon_lm.distributed.start", None)
    assert ranks.place() == Place()
