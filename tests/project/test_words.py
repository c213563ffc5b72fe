"""Counts, bytes and parameters as people read them, and no message that builds its own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from horizon_lm.report.display import number
from horizon_lm.words import count, parameters, size

SOURCES = Path(__file__).parents[2] / "src" / "horizon_lm"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1204, "1,204 steps")],
)
def test_a_count_agrees_with_its_noun(number: int, text: str) -> None:
    assert count(number, "step") == text
    assert count(number, "micro-batch", "micro-batches").endswith("batch" if number == 1 else "batches")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        *[(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.00 kB"), (786_432, "786 kB")],
        *[(999_999, "1.00 MB"), (75_500_000, "75.5 MB"), (1_130_000_000, "1.13 GB"), (-2e9, "-2.00 GB")],
        *[(999_960_000, "1.00 GB"), (14e9, "14.0 GB"), (1.5e12, "1.50 TB")],
    ],
)
def test_bytes_are_never_nothing_where_there_are_some(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(1, "1 parameter"), (37_120, "37,120 parameters"), (999_600, "1.00 M parameters")],
        *[(18_900_000, "18.9 M parameters"), (342_000_000, "342 M parameters")],
        *[(4.02e9, "4.02 B parameters"), (118e9, "118 B parameters")],
    ],
)
def test_parameters(number: float, text: str) -> None:
    assert parameters(number) == text


# Gigabytes with a fixed number of digits ("0.00 GB"), and a noun that is plural for 1 too ("1 steps").
BUILT_BY_HAND = [
    re.compile(r"1e9:[.0-9]+f\} (GB|B)\b"),
    re.compile(r":,\} (steps|documents|sequences|tokens|rows|faults|files|layers|bytes|checkpoints)\b"),
]
ALLOWED = ("bench/", "plan/calibrate.py")  # tables with one unit for a column


def test_no_message_builds_its_own_numbers() -> None:
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*.py"))
        if not str(path.relative_to(SOURCES)).startswith(ALLOWED)
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(pattern.search(line) for pattern in BUILT_BY_HAND)
    ]
    assert not found, "\n".join(found)


def test_numbers_keep_the_digits_that_are_read() -> None:
    assert [number(x) for x in (6.90791, 999.94, 1000.4, 656_327.9, 4.34e6, math.inf, math.nan)] == [
        "6.9079",
        "999.9400",
        "1,000",
        "656,328",
        "4.34e+06",
        "inf",
        "nan",
    ]
