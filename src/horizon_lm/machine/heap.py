"""Python's garbage collector, kept out of time-critical sections."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection: with torch and transformers loaded, a full collection
    takes 0.1 s in the middle of a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage a hundred times less often, while many objects are made of which few form cycles: full
    collections took a sixth of the time of a plan."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
