"""The training step as data: ops, builder, derived waits, checker, simulator. Pure Python, no torch."""

from horizon_lm.schedule.build import build, build_flush, build_save, build_steps
from horizon_lm.schedule.check import check
from horizon_lm.schedule.ops import Buffer, Lane, Op, parse_op
from horizon_lm.schedule.simulate import Simulation, simulate
from horizon_lm.schedule.step_spec import StepSpec
from horizon_lm.schedule.waits import TRANSIENT, derive_waits, last_uses
from horizon_lm.schedule.world import check_world, digest

__all__ = [
    "TRANSIENT",
    "Buffer",
    "Lane",
    "Op",
    "Simulation",
    "StepSpec",
    "build",
    "build_flush",
    "build_save",
    "build_steps",
    "check",
    "check_world",
    "derive_waits",
    "digest",
    "last_uses",
    "parse_op",
    "simulate",
]
