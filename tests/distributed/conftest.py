"""What tests of ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lost_ranks import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ranks:
        yield ranks
