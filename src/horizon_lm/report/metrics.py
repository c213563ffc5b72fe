"""metrics.jsonl: what the run did, one JSON object a line, readable while it is written.

    {"event": "start", ...}     versions, machine, size of the model and of the data
    {"event": "step", ...}      every logging_steps steps, see `Metrics`
    {"event": "timeline", ...}  what ran when in one step, once a run
    {"event": "eval", ...}      every evaluation, see `evaluation.Evaluation`
    {"event": "checkpoint", ...}   one that was saved, or why it was not
    {"event": "fault", ...}     a step that was not learned from, or a loss spike, and what was done
    {"event": "stopped", ...}   a run that ended before num_steps: the step, and by whom
    {"event": "best", ...}      the evaluation whose model was exported, with load_best_model_at_end
    {"event": "note", ...}      a setting that does not hold any more from a step on, and why
    {"event": "rollback", "step": n}, {"event": "resume", "step": n}
                                the run goes on after step n: lines of later steps before this one are of
                                steps that were undone, and `read_steps` passes over them
    {"event": "end", ...}       "status": finished, interrupted or failed; "step": the last one done; "reason"
                                or "error": why the run stopped

Every line has `event` and `time` (UTC). Numbers that are not finite are null, never 0.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TextIO

import psutil
import torch

from horizon_lm.checkpoint.run_folder import writing
from horizon_lm.data import Loader
from horizon_lm.engine.lanes import Span
from horizon_lm.errors import DataError, StoppedError
from horizon_lm.host_model import HostModel
from horizon_lm.io import files
from horizon_lm.report.events import Evaluation, StepRecord
from horizon_lm.report.flops import ModelFlops
from horizon_lm.report.records import check
from horizon_lm.words import count

_MOST_WAITING = 16 << 20  # bytes of lines that the disk does not take
_PACKAGES = ("horizon-lm", "torch", "transformers", "tokenizers", "safetensors", "datasets", "trl")


@dataclass(frozen=True)
class Metrics:
    """One line of the file: the steps since the line before it.

    loss: mean over their target tokens, without skipped steps; grad_norm (before clipping),
    learning_rate and epoch: of the last step; tokens_per_second: real tokens, that is without padding;
    mfu: see `flops`. Since the start of the run: num_tokens (real) and num_target_tokens (trained on),
    seconds (in steps), skipped_steps. device_bytes: peak on a CUDA device, else what the slots hold (0
    where they share the store's memory). lanes: share of the last step's time in which each lane worked,
    where it was recorded.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float
    num_tokens: int
    num_target_tokens: int
    seconds: float
    skipped_steps: int
    host_rss_bytes: int
    device_bytes: int
    lanes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `finite_or_none` of the fields was, back again."""
        found: dict[str, Any] = {k: math.nan if value is None else value for k, value in values.items()}
        return cls(**found)


@dataclass(frozen=True)
class _Computed:
    """In one step. tokens: without padding."""

    tokens: int
    flops: float


class Meter:
    """Sums up steps: `add` gives a record at every `every`th step, and at the first and the last.

    loader: knows how large its latest step was. flops: what the model computes. peak: FLOP/s of the device.
    num_steps: of the run, set once it is known.
    """

    def __init__(
        self,
        model: HostModel,
        loader: Loader,
        *,
        every: int,
        flops: ModelFlops,
        peak: float,
        num_steps: int = 0,
    ) -> None:
        self._model, self._loader, self._every, self.num_steps = model, loader, every, num_steps
        self._flops, self._peak = flops, peak
        self._window: list[tuple[StepRecord, _Computed]] = []
        self._num_tokens = self._num_targets = self._skipped = 0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The sums, and the steps since the last line; JSON-ready."""
        window = [[finite_or_none(asdict(value)) for value in pair] for pair in self._window]
        sums = [self._num_tokens, self._num_targets, self._skipped, self._seconds]
        return {"sums": sums, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_tokens, self._num_targets, self._skipped, self._seconds = state["sums"]
        self._window = []
        for record, done in state["window"]:
            values: dict[str, Any] = {k: math.nan if v is None else v for k, v in record.items()}
            values["rolled_back_to"] = record["rolled_back_to"]
            self._window.append((StepRecord(**values), self._computed(done)))

    def _computed(self, values: dict[str, Any]) -> _Computed:
        """What `asdict` made of it; earlier versions wrote the squared lengths in place of the FLOPs."""
        if "squares" in values:
            flops = self._flops.per_token * values["tokens"] + self._flops.per_square * values["squares"]
        else:
            flops = math.nan if values["flops"] is None else values["flops"]
        return _Computed(values["tokens"], flops)

    def add(self, record: StepRecord) -> Metrics | None:
        size = self._loader.size
        self._window.append((record, _Computed(size.tokens, self._flops.of(size))))
        self._num_tokens += size.tokens
        self._num_targets += record.num_tokens
        self._seconds += record.seconds
        self._skipped += record.skipped
        if record.step % self._every and record.step not in (1, self.num_steps):
            return None
        return self._line()

    def rest(self) -> Metrics:
        """The record of the steps since the last one (there are some), for a run that ends early."""
        return self._line(with_lanes=False)

    def _line(self, *, with_lanes: bool = True) -> Metrics:
        record = self._window[-1][0]
        window, self._window = self._window, []
        learned = [r for r, _ in window if not r.skipped]
        targets = sum(r.num_tokens for r in learned)
        seconds = sum(r.seconds for r, _ in window)
        return Metrics(
            step=record.step,
            epoch=record.epoch,
            loss=sum(r.loss * r.num_tokens for r in learned) / targets if targets else math.nan,
            grad_norm=record.grad_norm,
            learning_rate=record.learning_rate,
            tokens_per_second=sum(done.tokens for _, done in window) / seconds,
            mfu=sum(done.flops for _, done in window) / seconds / self._peak,
            num_tokens=self._num_tokens,
            num_target_tokens=self._num_targets,
            seconds=self._seconds,
            skipped_steps=self._skipped,
            host_rss_bytes=psutil.Process().memory_info().rss,
            device_bytes=device_bytes(self._model),
            lanes=lane_shares(self._model.timeline, record.seconds)
            if with_lanes and not record.skipped
            else {},
        )


def lane_shares(spans: Iterable[Span], seconds: float) -> dict[str, float]:
    """The share of `seconds` in which each lane worked; empty where nothing was recorded."""
    busy: dict[str, float] = {}
    for op, start, end in spans:
        name = op.lane.name.lower()
        busy[name] = busy.get(name, 0.0) + end - start
    return {name: min(1.0, time / seconds) for name, time in sorted(busy.items())}


class MetricsFile:
    """Written line by line; each is handed to the system before `write_step` returns.

    Nothing exists before the first step is written: then `begin` is called (it makes the folder
    ready), an earlier file is replaced and `header` becomes the first line. On leaving, the line
    `end` says how the run ended.

    Lines that a full or failing disk does not take wait for the next one, at most `_MOST_WAITING` bytes of
    them: they may be lost, the run is not. `warn` is told once, and at the end of what is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        begin: Callable[[], None],
        header: dict[str, Any],
        resumed_at: int | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """resumed_at: the file goes on, after that step."""
        self._path, self._begin, self._header, self._resumed_at = path, begin, header, resumed_at
        self._warn = warn
        self._file: TextIO | None = None
        self._unwritten = bytearray()
        self._num_dropped = 0
        self._fault = ""
        self._waiting: list[Evaluation] = []
        self.step = resumed_at or 0  # the last step done, logged or not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._file is None:
            return
        self._write("end", {**_ending(error), "step": self.step})
        missing = self._num_dropped + self._unwritten.count(b"\n")
        if missing:
            self._warn(f"{self._path} lacks {count(missing, 'line')}: {self._fault}")
        with suppress(OSError):  # a network file system may tell only now
            self._file.close()

    def open(self) -> None:
        """Begin the file, and with it the run, unless that is done. Raises DoesNotFitError when the disk
        is full."""
        if self._file is None:
            self._begin()
            goes_on = self._resumed_at is not None and self._path.exists()
            with writing(self._path):
                self._file = files.open_log(self._path, goes_on=goes_on)
            self._write("start", self._header)
            if self._resumed_at is not None:
                self._write("resume", {"step": self._resumed_at})
            for evaluation in self._waiting:
                self._write("eval", asdict(evaluation))

    def write_step(self, metrics: Metrics) -> None:
        """Append a line."""
        self.open()
        self._write("step", asdict(metrics))

    def write_event(self, event: str, values: dict[str, Any]) -> None:
        """Append a line of another kind; before the first step there is no file for it."""
        if self._file is not None:
            self._write(event, values)

    @property
    def has_begun(self) -> bool:
        """Whether the file exists: from the first recorded step on."""
        return self._file is not None

    def write_timeline(self, step: int, spans: Sequence[Span]) -> None:
        """Append what ran when in a step, as [op, lane, start, end] in seconds."""
        rows = [[str(op), str(op.lane), round(start, 7), round(end, 7)] for op, start, end in spans]
        self._write("timeline", {"step": step, "spans": rows})

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Append a line for an evaluation; those before the first step wait for it."""
        if self._file is None:
            self._waiting.append(evaluation)
            return
        self._write("eval", asdict(evaluation))

    def _write(self, event: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, **{key: finite_or_none(value) for key, value in values.items()}, "time": now}
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def _append(self, line: bytes) -> None:
        """Write what waits and the line, from where the disk has stopped taking it."""
        assert self._file is not None
        if len(self._unwritten) + len(line) > _MOST_WAITING:
            self._num_dropped += 1
        else:
            self._unwritten += line
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self._file.fileno(), self._unwritten)]
        except OSError as error:
            if not self._fault:
                self._warn(f"{self._path}: {error.strerror or error}; its lines wait, the run continues")
            self._fault = error.strerror or str(error)


def _ending(error: BaseException | None) -> dict[str, Any]:
    """Why a run ends, as the line `end` says it."""
    if error is None:
        return {"status": "finished"}
    if isinstance(error, StoppedError):
        return {"status": "interrupted", "error": None, "reason": error.message}
    if isinstance(error, KeyboardInterrupt | SystemExit):
        who = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "a second signal"
        return {"status": "interrupted", "error": None, "reason": f"{who} ended the run within a step"}
    return {"status": "failed", "error": str(error) or type(error).__name__}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The step records of a metrics file; a last line that is cut off (a killed run) is passed over."""
    return still_true(read_lines(path), "step")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a metrics file."""
    return still_true(read_lines(path), "eval")


def still_true(lines: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The lines of a kind, without those of steps that a later rollback or resume undid."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == event:
            found.append(line)
        elif line.get("event") in ("rollback", "resume"):
            found = [earlier for earlier in found if earlier["step"] <= line["step"]]
    return found


def mean_of_tail(steps: Sequence[dict[str, Any]]) -> float:
    """Mean loss over the last tenth of the finite records, as single steps are noisy; NaN without any."""
    losses = [line["loss"] for line in steps if line.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, in order, without a last one that is cut off. Raises DataError for what is
    damaged, OSError."""
    try:
        lines = files.read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: {error.reason} at byte {error.start:,}") from None
    last = len(lines) if lines[-1] else len(lines) - 1
    for number, line in enumerate(lines[:last], start=1):
        try:
            found = json.loads(line, parse_constant=_not_finite)
        except (ValueError, RecursionError) as error:
            if number == last:
                return
            raise DataError(f"{path}:{number} is damaged: {getattr(error, 'msg', error)}") from None
        yield check(found, f"{path}:{number}")


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide on the numbers."""
    return {"python": platform.python_version(), **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Versions of packages, each read from a file that takes 5 ms to parse."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from a source folder
            found[name] = version(name)
    return found


def device_bytes(model: HostModel) -> int:
    """Bytes taken on the compute device: the peak on CUDA, else the slots that are no part of the store."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    memory = model.memory_bytes()
    return memory["weight_slots"] + memory["gradient_slots"]


def finite_or_none(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite are null."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
