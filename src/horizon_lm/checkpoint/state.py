"""The shape of a manifest's trainer state and settings, checked before either is used.

Anybody can write a manifest with a valid checksum. Keys that are not named here pass unchecked; all may be
missing, as checkpoints of earlier versions lack some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_MOST = 1 << 53  # steps, rows, tokens: what every part counts exactly

Count = Annotated[int, Field(ge=0, le=_MOST)]
Real = Annotated[float, Field(ge=-1e60, le=1e60)]
Number = Real | None  # null: not finite


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Loop(_Part):
    step: Count
    skipped_in_a_row: Count
    rollbacks: Count


class _Loader(_Part):
    epoch: Count = 0
    position: Count = 0
    document: Count = 0
    seed: Annotated[int, Field(ge=0, le=1 << 64)] = 0
    rows: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    crosses_epochs: bool = True
    counted: list[Count] = Field(default=[0, 0], min_length=2, max_length=2)

    @model_validator(mode="after")
    def _is_in_the_data(self) -> Self:
        if self.rows is not None and self.position > self.rows:
            raise ValueError(f"position {self.position} is beyond its {self.rows} rows")
        return self


class _Meter(_Part):
    sums: Annotated[tuple[Count, Count, Count, Real], Field(strict=False)]
    window: list[Annotated[tuple[dict[str, Any], dict[str, Any]], Field(strict=False)]] = []


class _Last(_Part):
    step: Count
    learning_rate: Number = None
    loss: Number = None
    num_tokens: Count = 0
    seconds: Number = None


class _Mark(_Part):
    value: Real
    step: Count
    path: Annotated[str, Field(max_length=4096)] | None


class _Best(_Part):
    best: _Mark | None
    kept: _Mark | None
    asked: _Mark | None
    evaluations: Count
    waited: Count


class _State(_Part):
    steps_done: Count = 0
    loop: _Loop | None = None
    loader: _Loader | None = None
    meter: _Meter = _Meter(sums=(0, 0, 0, 0.0))
    losses: list[Real] = []
    kept_in_fp32: list[str] = []
    last: _Last | None = None
    best: _Best | None = None


class _Config(_Part):
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_length: Count = 0
    per_device_train_batch_size: Count = 0
    gradient_accumulation_steps: Count = 0


def fault(config: dict[str, Any], state: dict[str, Any]) -> str | None:
    """The first value that cannot be used, in words; None if there is none."""
    for name, kind, values in (("config", _Config, config), ("state", _State, state)):
        try:
            kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join((name, *map(str, first["loc"])))
            return f"{where} is {first['input']!r:.60}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return None
