"""How often random tests repeat: enough to find a fault that is there, and in `make soak` many times more."""

from __future__ import annotations

import os

SOAK = bool(os.environ.get("HORIZON_SOAK"))


def times(few: int, many: int) -> int:
    """`many` in `make soak`."""
    return many if SOAK else few
