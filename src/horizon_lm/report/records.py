"""Records of a run: its steps and evaluations, and the schema of the lines of metrics.jsonl.

Lines are validated before use, because the file may be damaged or edited. Unknown fields pass unchecked. All
fields but `step` are optional: files of earlier versions lack some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from horizon_lm.errors import DataError
from horizon_lm.schedule.ops import parse_op

_LARGEST = 1e60  # far above any measurement, and safe to draw
REMOVE_LINE = "remove this line; the others can be read without it"


@dataclass(frozen=True)
class StepRecord:
    """Result of one optimizer step.

    step: from 1
    epoch: passes over the data so far
    loss: mean over the step's target tokens; of preferences over its samples
    grad_norm: before clipping; NaN if it was not computed
    num_tokens: target tokens
    skipped: nothing was updated, because loss or norm was not finite or spiked
    rolled_back_to: the step that the run returned to after this one
    note: the problem, in words; empty for nearly all steps
    changes: settings that no longer apply from this step on, and why (a layer that cannot keep activations)
    remarks: other notes (compile times)
    num_samples: pairs or labelled samples; 0 where tokens are trained on for their own sake
    sums: sum and count of each metric of preferences
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float
    skipped: bool
    rolled_back_to: int | None = None
    note: str = ""
    changes: Sequence[str] = ()
    remarks: Sequence[str] = ()
    num_samples: int = 0
    sums: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """What the loss is a mean over."""
        return self.num_samples or self.num_tokens


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation. eval_loss: mean over target tokens, nats; eval_perplexity: exp(eval_loss).

    Of preferences: the method's loss, no perplexity, and its metrics by their names in training.
    """

    step: int
    eval_loss: float
    eval_perplexity: float | None
    eval_tokens: int
    eval_seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_line(self) -> dict[str, Any]:
        """Return names and values as in a line of metrics.jsonl."""
        values = {k: v for k, v in vars(self).items() if k != "metrics" and v is not None}
        return {**values, **{f"eval_{name}": value for name, value in self.metrics.items()}}

    def value(self, metric: str) -> float:
        """Return a metric by its name in a line; NaN if it was not measured."""
        return float(self.to_line().get(metric, math.nan))


Real = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
Number = Real | None  # null: not finite
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Step = Annotated[int, Field(ge=0, le=1 << 53)]
Text = str | None


def _op(name: str) -> str:
    parse_op(name)
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Line(_Part):
    event: str
    time: Text = None


class _Settings(_Part):
    max_grad_norm: Number = None


class _File(_Part):
    weight: Number = None


class _Data(_Part):
    files: list[_File] | None = None
    bad_rows: list[Any] | None = None
    eval_files: list[Any] | None = None
    documents: Count = 0
    tokens: Count = 0
    trained_tokens: Count = 0
    left_out: Count | None = None
    truncated: Count | None = None
    empty: Count | None = None
    bad: Count | None = None
    eval_sequences: Count | None = None
    eval_tokens: Count = 0


class _Choice(_Part):
    """A choice of the planner, shown unchecked."""


class _Plan(_Part):
    tokens_per_second: Number = None
    host_total: Real = 0.0
    device_total: Real = 0.0
    host_bytes: dict[str, Real] | None = None
    device_bytes: dict[str, Real] | None = None
    lane_seconds: dict[str, Real] | None = None
    step_seconds: Number = None
    hardware: dict[str, Any] | None = None
    notes: list[Any] | None = None
    choices: list[_Choice] | None = None


class _Machine(_Part):
    host_bytes: Real = 0.0


class _Start(_Line):
    num_steps: Step | None = None
    num_parameters: Count | None = None
    num_sequences: Count | None = None
    max_length: Count | None = None
    fill: Number = None
    peak_flops: Number = None
    versions: dict[str, Any] | None = None
    machine: _Machine | None = None
    notes: list[Any] | None = None
    named: list[str] | None = None
    data: _Data | None = None
    settings: _Settings | None = None
    plan: _Plan | None = None


class _OfStep(_Line):
    step: Step


class _Ranks(_Part):
    world: Annotated[int, Field(ge=1, le=1 << 20)]
    tokens_per_second_each: Number = None
    bytes_sent: Real = 0.0
    network_seconds: list[Real] = []
    waiting_seconds: list[Real] = []
    host_rss_bytes: list[Real] = []
    slowest: Count | None = None
    slowest_lane: Annotated[str, Field(max_length=40)] = ""


class _Step(_OfStep):
    epoch: Number = None
    loss: Number = None
    grad_norm: Number = None
    learning_rate: Number = None
    tokens_per_second: Number = None
    mfu: Number = None
    num_tokens: Count | None = None
    num_target_tokens: Count | None = None
    seconds: Number = None
    skipped_steps: Count | None = None
    host_rss_bytes: Number = None
    device_bytes: Number = None
    lanes: dict[str, Real] | None = None
    ranks: _Ranks | None = None


class _Evaluation(_OfStep):
    eval_loss: Number = None
    eval_perplexity: Number = None
    eval_tokens: Count | None = None
    eval_seconds: Number = None


class _Checkpoint(_OfStep):
    seconds: Number = None
    bytes: Number = None
    name: Annotated[str, Field(max_length=255)] | None = None


class _Fault(_OfStep):
    loss: Number = None


class _Best(_OfStep):
    value: Number = None


class _Timeline(_OfStep):
    spans: list[Annotated[tuple[Annotated[str, AfterValidator(_op)], str, Real, Real], Field(strict=False)]]


class _End(_Line):
    step: Step | None = None


_KINDS: dict[str, type[_Line]] = {
    "start": _Start,
    "step": _Step,
    "eval": _Evaluation,
    "checkpoint": _Checkpoint,
    "fault": _Fault,
    "best": _Best,
    "timeline": _Timeline,
    "end": _End,
    **dict.fromkeys(("note", "stopped", "rollback", "resume"), _OfStep),
}


def check(line: Any, place: str) -> dict[str, Any]:
    """Return the line if it is valid. Raises DataError that names the invalid value."""
    kind = _KINDS.get(str(line.get("event")), _Line) if isinstance(line, dict) else _Line
    return _checked(kind, line, place)


def check_settings(values: Any, place: str) -> dict[str, Any]:
    """Return settings read from a run's folder if they are valid. Raises DataError."""
    return _checked(_Settings, values, place)


def _checked(kind: type[_Part], values: Any, place: str) -> dict[str, Any]:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        why = first["msg"][:1].lower() + first["msg"][1:]
        raise DataError(
            f"{place} is damaged: {where} is {first['input']!r:.60}: {why}",
            hint=REMOVE_LINE,
        ) from None
    found: dict[str, Any] = values
    return found
