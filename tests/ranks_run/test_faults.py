"""One of each kind of fault on several ranks; `python -m tests.ranks_soak` has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rank_matrix import Case, Matrix, cases
from rank_server import RankServer
from sizes import SOAK

FEW = (
    "kill -9 of rank 1 of 2, forward",
    "kill -9 of rank 0 of 2, backward",
    "kill -9 of rank 0 of 2, before_rename",
    "kill -9 of rank 3 of 4, write",
    "NaN on rank 1 of 2",
    "no target tokens on rank 1 of 2",
    "disk full on rank 1 of 2",
    "SIGTERM to (1,) of 2",
    "data on rank 0 of 2",
    "other data on rank 3 of 4",
)


@pytest.fixture(scope="module")
def matrix(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(server, tmp_path_factory.mktemp("matrix"))


def test_the_matrix_has_every_kind_of_fault_on_every_rank() -> None:
    found = cases()
    assert len(found) >= 60 and len({case.name for case in found}) == len(found)
    assert set(FEW) <= {case.name for case in found}
    for world in (2, 4):
        for at in ("forward", "backward", "write", "before_rename", "after_rename"):
            killed = {
                rank
                for case in found
                for rank, fault in case.faults.items()
                if case.world == world and (fault["kind"], fault.get("at")) == ("kill", at)
            }
            assert killed == set(range(world))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", [c for c in cases() if SOAK or c.name in FEW], ids=lambda case: case.name)
def test_a_fault_ends_or_passes_and_the_run_goes_on_with_the_same_bits(
    case: Case, matrix: Matrix, tmp_path: Path
) -> None:
    matrix.check(case, tmp_path / "run")
