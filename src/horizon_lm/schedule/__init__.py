"""The training step as data: ops, builder, derived waits, checker. Pure Python, no torch."""

from .build import StepPlan, build, build_steps, derive_waits, last_uses
from .check import check
from .ops import Buffer, Lane, Op, parse_op

__all__ = [
    "Buffer",
    "Lane",
    "Op",
    "StepPlan",
    "build",
    "build_steps",
    "check",
    "derive_waits",
    "last_uses",
    "parse_op",
]
