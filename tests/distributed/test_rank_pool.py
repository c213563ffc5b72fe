"""The pool of ranks reports what goes wrong on any rank, and works again."""

from __future__ import annotations

import time

import pytest

from rank_pool import RankPool, RankPoolError


def test_errors_hangs_and_lost_processes_are_reported() -> None:
    with RankPool(2) as pool:
        pids = pool.run("os:getpid")
        assert pool.run("os:getpid") == pids  # the same processes
        with pytest.raises(RankPoolError, match="(?s)rank 1: Traceback.*ValueError: invalid literal"):
            pool.run_each("builtins:int", [("1",), ("one",)])
        assert pool.run("os:getpid") != pids
        start = time.monotonic()
        with pytest.raises(RankPoolError, match="(?s)no result after 0.5 s.*serve"):
            pool.run("time:sleep", 60, timeout=0.5)
        assert time.monotonic() - start < 5
        with pytest.raises(RankPoolError, match="(?s)rank 0: process ended with code 7"):
            pool.run_each("os:_exit", [(7,), (8,)])
