"""Python's heap: the garbage collector's share of a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """The garbage collector leaves alone what is there at the beginning: with torch and transformers loaded, a
    look through all of it takes 0.1 s, in the middle of whatever runs. At the end it is looked at again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
