"""The benchmark of packed weights, on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import low_bit, report

from adapter_runs import make_base

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_benchmark_of_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(
        low_bit.SHAPES, "110 M", {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    )
    model = str(make_base(tmp_path / "model"))
    given = ["--tokens", "32", "--passes", "1", "--shapes", "110 M", "--model", model, "--rows", "8"]
    assert low_bit.main(given) == 0
    (file,) = tmp_path.glob("*-low-bit-cpu.md")
    rows = [line.split(" | ") for line in file.read_text().splitlines() if line.startswith("| ")]
    times = [row for row in rows if row[0] == "| 110 M"]
    assert [row[2] for row in times] == ["auto", "int8", "nf4"] * 2
    assert all(row[6].rstrip(" |").endswith("%") == (row[2] != "auto") for row in times)
    losses = {row[0].removeprefix("| "): float(row[1]) for row in rows if row[0][2:] in low_bit.KINDS}
    assert losses.keys() == {"auto", "int8", "nf4"} and len(set(losses.values())) == 3
