"""Ops and buffers as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon_lm.schedule import Buffer, Op, build, parse_op
from horizon_lm.schedule.ops import LANE_OF_KIND
from schedule_authorities import PLANS


def test_ops_are_printed_and_parsed() -> None:
    for plan in PLANS[::50]:
        for op in build(plan):
            assert parse_op(str(op)) == (op.kind, op.unit, op.micro_batch)
    assert parse_op("U0") == ("U", 0, -1)
    assert parse_op("N") == ("N", -1, -1)
    assert parse_op("B12.34") == ("B", 12, 34)


@given(
    st.sampled_from(sorted(LANE_OF_KIND)),
    st.integers(-1, 10**6),
    st.integers(-1, 10**6),
)
def test_print_and_parse_round_trip(kind: str, unit: int, micro_batch: int) -> None:
    assert parse_op(str(Op(kind, unit, micro_batch))) == (kind, unit, micro_batch)


@pytest.mark.parametrize("text", ["", "3", "Z3", "U-1", "U3.", "U3.1.2", "u3", "U 3", "U3\n", "U٣"])
def test_text_that_is_no_op_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an op"):
        parse_op(text)


def test_buffers_are_printed() -> None:
    assert str(Buffer("weights", 3)) == "weights.3"
    assert str(Buffer("input", 3, 1)) == "input.3.1"
    assert str(Buffer("call", -1, 1)) == "call.m1"
    assert str(Buffer("clip")) == "clip"
