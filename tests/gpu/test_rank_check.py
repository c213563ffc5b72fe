"""The check of ranks notices other bits, ranks that fail and ranks that hang.

Its dry run is part of that of the whole suite: tests/bench/test_gpu_evidence.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from gpu import ranks
from gpu.common import Part, Place

PLACE = Place(torch.device("cpu"), True)
WANTED = {"run": {"losses": [1.0, 0.5], "weights": "abc"}}


def compared(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], why: str = "") -> Any:
    monkeypatch.setattr(ranks, "_run", lambda *_: (found, why))
    part = Part("ranks")
    ranks._compare(part, PLACE, "shared", 2, WANTED)
    (row,) = part.rows
    return row


def test_equal_bits_pass_and_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, [WANTED, WANTED]).passed
    other = {"run": {"losses": [1.0, 0.5], "weights": "abd"}}
    row = compared(monkeypatch, [WANTED, other])
    assert row.passed is False and row.why == "weights"
    assert compared(monkeypatch, [WANTED, {}]).passed is False
    assert compared(monkeypatch, [], "rank 1 failed: no").why == "rank 1 failed: no"


def test_a_rank_that_fails_ends_the_others_and_is_named() -> None:
    found, why = ranks._run(PLACE, "no such mode", 2)
    assert found == [] and why.startswith("rank ") and "failed" in why


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "raise SystemExit(3)"])
def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(ranks, "SECONDS", 0.5)
    processes = [
        subprocess.Popen([sys.executable, "-c", text]) for text in (code, "import time; time.sleep(60)")
    ]
    why = ranks._wait(processes)
    assert why == ("rank 0 failed" if "Exit" in code else "not done after 0 s")
    assert all(process.returncode is not None for process in processes)
