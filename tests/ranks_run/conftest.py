"""One process that forks the ranks of all runs of a test file, and data for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rank_server import RankServer
from small_runs import write_text


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")
