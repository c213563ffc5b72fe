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


_RARE = 70_000  # new objects until a collection; Python's own number is 700, or 2,000


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage far less often, while many objects are made of which few form cycles."""
    before = gc.get_threshold()
    gc.set_threshold(max(_RARE, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
