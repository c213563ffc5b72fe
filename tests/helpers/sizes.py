"""How often random tests repeat: enough to find a fault that is there, and in `make soak` many times more."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

SOAK = bool(os.environ.get("HORIZON_SOAK"))


def times(few: int, many: int) -> int:
    """`many` in `make soak`."""
    return many if SOAK else few


def paired(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every two of them in `make soak`, else every one with one of the others."""
    one, two = list(first), list(second)
    if SOAK:
        return list(itertools.product(one, two))
    return [(one[i % len(one)], two[i % len(two)]) for i in range(max(len(one), len(two)))]
