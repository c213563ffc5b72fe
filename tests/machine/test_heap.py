"""Garbage collection is rare while many objects are made, and is as before afterwards."""

from __future__ import annotations

import gc

import pytest

from horizon_lm.machine.heap import rare_collections


def collections_of(objects: int) -> int:
    """Return how many collections the making of so many objects takes."""
    before = sum(generation["collections"] for generation in gc.get_stats())
    kept = [[] for _ in range(objects)]  # type: ignore[var-annotated]
    assert len(kept) == objects
    return sum(generation["collections"] for generation in gc.get_stats()) - before


def test_collections_are_rare() -> None:
    limits = gc.get_threshold()
    usual = collections_of(10 * limits[0])
    with rare_collections():
        assert collections_of(10 * limits[0]) <= 1 < usual
        assert gc.get_threshold() != limits
    assert gc.get_threshold() == limits


def test_collections_are_as_before_after_an_error() -> None:
    limits = gc.get_threshold()
    with pytest.raises(RuntimeError), rare_collections():
        raise RuntimeError
    assert gc.get_threshold() == limits
