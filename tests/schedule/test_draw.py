"""Timelines: the trace for Perfetto and the table for the terminal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from horizon_lm.report.metrics import lane_shares
from horizon_lm.schedule import Lane, Op, StepSpec, build
from horizon_lm.schedule.draw import MEANING, busy_seconds, chrome_trace, text_timeline, utilisation
from horizon_lm.schedule.ops import LANE_OF_KIND

UPLOAD, FORWARD = Op("U", 3, slot=1), Op("F", 3, 0, slot=1)
SPANS = [(UPLOAD, 0.010, 0.040), (FORWARD, 0.040, 0.060), (Op("O", 3), 0.060, 0.110)]


def test_trace() -> None:
    trace = json.loads(json.dumps(chrome_trace(SPANS)))
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["upload", "compute", "update"]
    shown = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], names[e["tid"]]) for e in shown] == [
        ("U3", "upload"),
        ("F3.0", "compute"),
        ("O3", "update"),
    ]
    assert shown[0]["ts"] == pytest.approx(10_000) and shown[0]["dur"] == pytest.approx(30_000)
    assert shown[1]["args"] == {"unit": 3, "micro_batch": 0, "slot": 1}


def test_trace_of_a_whole_step() -> None:
    units = frozenset(range(5))
    ops = build(StepSpec(layers=3, uploaded=units, trainable=units, embedding_unit=4, micro_batches=2))
    spans = [(op, float(i), i + 1.0) for i, op in enumerate(ops)]
    assert sum(e["ph"] == "X" for e in chrome_trace(spans)["traceEvents"]) == len(ops)
    assert sum(row["ops"] for row in utilisation(spans).values()) == len(ops)
    assert sum(row["share"] for row in utilisation(spans).values()) == pytest.approx(1)


@pytest.mark.parametrize(("sums", "kinds"), [("host", "PGA"), ("add", "PSGA")])
def test_residents_and_rounds_are_drawn(sums: str, kinds: str) -> None:
    """Ops of a resident unit's update have a row of their own, and every op has a name."""
    units = frozenset(range(1, 6))
    spec = StepSpec(
        layers=3,
        uploaded=units - {1},
        trainable=units,
        embedding_unit=5,
        micro_batches=4,
        resident=frozenset({1}),
        rounds=4,
        sums=sums,
    )
    spans = [(op, float(i), i + 1.0) for i, op in enumerate(build(spec))]
    events = chrome_trace(spans)["traceEvents"]
    rows = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    (update,) = (e for e in events if e["name"] == "A1")
    assert update["tid"] == rows["device_update"] and update["cat"] == "optimizer on the device"
    assert {op.kind for op, _, _ in spans} >= {*kinds}
    lines = text_timeline(spans).splitlines()
    assert len({line.index("ms  ") for line in lines[1:]}) == 1  # columns stay aligned


def test_collectives_have_a_row_of_their_own() -> None:
    """Only with several ranks."""
    spec = StepSpec(3, frozenset(range(1, 6)), frozenset(range(1, 6)), 5)
    alone = [(op, float(i), i + 1.0) for i, op in enumerate(build(spec))]
    ops = build(replace(spec, world=2, reduction="exact"))
    spans = [(op, float(i), i + 1.0) for i, op in enumerate(ops)]
    events = chrome_trace(spans)["traceEvents"]
    rows = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    (total,) = (e for e in events if e["name"] == "T3.0")
    assert total["tid"] == rows["network"] and total["cat"] == "add up gradients of all ranks"
    assert total["args"] == {"unit": 3, "micro_batch": 0, "grad_slot": 0, "grad_shard": 0}
    row = utilisation(spans)["network"]
    assert row["ops"] == sum(op.kind in "JTV" for op in ops) and "network" in text_timeline(spans)
    assert "network" not in utilisation(alone) and "network" not in text_timeline(alone)


def test_every_kind_has_a_meaning() -> None:
    assert MEANING.keys() == LANE_OF_KIND.keys() and set(LANE_OF_KIND.values()) == set(Lane)


def test_utilisation_counts_overlap_once() -> None:
    spans = [(UPLOAD, 0.0, 2.0), (UPLOAD, 1.0, 3.0), (FORWARD, 0.0, 6.0)]
    assert utilisation(spans) == {
        "upload": {"ops": 2, "busy_seconds": 3.0, "share": 0.5},
        "compute": {"ops": 1, "busy_seconds": 6.0, "share": 1.0},
    }


def test_text() -> None:
    lines = text_timeline(SPANS).splitlines()
    assert lines[0].endswith("0 to 100.0 ms")
    assert [line.split()[:5] for line in lines[1:]] == [
        ["upload", "1", "30.0", "ms", "30%"],
        ["compute", "1", "20.0", "ms", "20%"],
        ["update", "1", "50.0", "ms", "50%"],
    ]
    upload, compute, update = (line.split()[5] for line in lines[1:])
    assert len({len(upload), len(compute), len(update)}) == 1
    assert upload.startswith("#") and upload.endswith(".")
    assert update.startswith(".") and update.endswith("#")


def test_nothing_recorded() -> None:
    assert text_timeline([]) == "no spans were recorded"
    assert chrome_trace([])["traceEvents"][1:] == []
    assert utilisation([]) == {} and busy_seconds([]) == {}


def test_spans_without_length() -> None:
    spans = [(FORWARD, 1.0, 1.0)]
    assert utilisation(spans)["compute"]["share"] == 0.0
    assert "compute" in text_timeline(spans)


def test_metrics_count_overlapping_spans_of_a_lane_once() -> None:
    """As the table does; a sum of durations would say that the lane was busy all the time."""
    op = Op("U", 0, micro_batch=-1)
    spans = [(op, 0.0, 2.0), (op, 1.0, 3.0)]
    assert lane_shares(spans, 4.0) == {"upload": 0.75}
