"""Agreement of the ranks of a pool."""

from __future__ import annotations

from typing import Any

from horizon_lm.distributed.agreement import agree
from horizon_lm.errors import HorizonError
from rank_pool import ranks


def how(values: dict[str, Any]) -> Any:
    """Return what was raised."""
    try:
        agree(ranks(), values)
    except HorizonError as error:
        return type(error).__name__, error.message, error.is_shared
    return None
