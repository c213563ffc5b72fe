"""The training step as data: ops, builder, derived waits, checker, simulator. Pure Python, no torch."""

from .build import build, build_flush, build_save, build_steps
from .check import check
from .ops import Buffer, Lane, Op, parse_op
from .simulate import Simulation, simulate
from .step_plan import StepPlan
from .waits import TRANSIENT, derive_waits, last_uses

__all__ = [
    "TRANSIENT",
    "Buffer",
    "Lane",
    "Op",
    "Simulation",
    "StepPlan",
    "build",
    "build_flush",
    "build_save",
    "build_steps",
    "check",
    "derive_waits",
    "last_uses",
    "parse_op",
    "simulate",
]
