"""metrics.jsonl: the log of a run, one JSON object per line, readable while it is written.

    {"event": "start", ...}     versions, machine, size of model and data
    {"event": "step", ...}      every logging_steps steps; see `Metrics`
    {"event": "timeline", ...}  start and end of each op of one step, once per run
    {"event": "eval", ...}      each evaluation; see `records.Evaluation`
    {"event": "checkpoint", ...}   a saved checkpoint, or why it was not saved
    {"event": "fault", ...}     a skipped step or a loss spike, and the reaction
    {"event": "stopped", ...}   the step at which a run ended before num_steps, and who stopped it
    {"event": "best", ...}      the evaluation whose model was exported (load_best_model_at_end)
    {"event": "note", ...}      a setting that changed at a step, and why; or a remark
    {"event": "rollback", "step": n}, {"event": "resume", "step": n}
                                the run continues after step n: earlier lines of later steps are undone, and
                                `read_steps` skips them
    {"event": "end", ...}       "status": finished, interrupted or failed; "step": the last step done;
                                "reason" or "error": why the run ended

Every line has `event` and `time` (UTC). Numbers that are not finite are null, never 0.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TextIO

import psutil
import torch

from horizon_lm.checkpoint.folder import writing
from horizon_lm.data import Loader
from horizon_lm.engine.lanes import Span
from horizon_lm.errors import DataError, StoppedError
from horizon_lm.host_model import HostModel
from horizon_lm.io import files
from horizon_lm.outputs import bytes_of_slots
from horizon_lm.preference.method import added, means
from horizon_lm.report.by_rank import figures_of_all
from horizon_lm.report.flops import ModelFlops
from horizon_lm.report.records import REMOVE_LINE, Evaluation, StepRecord, check
from horizon_lm.schedule.draw import busy_seconds
from horizon_lm.version import VERSION
from horizon_lm.words import count

_MOST_UNWRITTEN = 16 << 20  # bytes
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "trl", "peft")


@dataclass(frozen=True)
class Metrics:
    """A line `step`: the steps since the previous one.

    loss: mean over their target tokens, of preferences over their samples, without skipped steps
    grad_norm (before clipping), learning_rate, epoch: values of the last step
    tokens_per_second: real tokens, without padding
    mfu: see `flops`
    num_tokens (real), num_target_tokens (trained on), seconds (in steps), skipped_steps: totals of the run
    device_bytes: peak on a CUDA device, else size of the slots (0 if they share the store's memory)
    lanes: busy share of each lane in the last step, if it was recorded
    preferences: metrics of a method on preferences, which the line has beside the others
    ranks: figures of the ranks of a run on several, see `by_rank`; host_rss_bytes, device_bytes and lanes are
    those of rank 0, tokens and mfu of all
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
    preferences: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> dict[str, Any]:
        """Return names and values as in a line of metrics.jsonl."""
        ranks = {"ranks": self.ranks} if self.ranks else {}
        return {**_without(asdict(self)), **self.preferences, **ranks}

    def to_json(self) -> dict[str, Any]:
        """Return the values for a checkpoint, the same on any number of ranks."""
        values: dict[str, Any] = finite_or_none(asdict(replace(self, ranks={})))
        del values["ranks"]
        return values if self.preferences else _without(values)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Invert `finite_or_none`."""
        found: dict[str, Any] = {k: math.nan if value is None else value for k, value in values.items()}
        return cls(**found)


def _without(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only runs on preferences or on several ranks have."""
    return {k: v for k, v in values.items() if k not in ("preferences", "ranks", "sums", "num_samples")}


@dataclass(frozen=True)
class _Computed:
    """Work of one step. tokens: without padding."""

    tokens: int
    flops: float


class Meter:
    """Totals of the steps: `add` returns metrics at every `every`th step, and at the first and the last.

    loader: has the size of its latest step. flops: FLOPs of the model. peak: FLOP/s of the device.
    num_steps: length of the run; set it once it is known.
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
        """Return the totals and the steps since the last line, JSON-ready."""
        window = [[_saved(record), finite_or_none(asdict(done))] for record, done in self._window]
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
        """Read `_Computed`; earlier versions saved squared lengths instead of FLOPs."""
        if "squares" in values:
            flops = self._flops.per_token * values["tokens"] + self._flops.per_square * values["squares"]
        else:
            flops = math.nan if values["flops"] is None else values["flops"]
        return _Computed(values["tokens"], flops)

    def is_due(self, step: int) -> bool:
        """Tell whether `add` returns metrics for this step."""
        return step % self._every == 0 or step in (1, self.num_steps)

    def add(self, record: StepRecord, by_rank: Sequence[Mapping[str, Any]] = ()) -> Metrics | None:
        """Add a step. by_rank: figures of each rank since the last line, of a run on several."""
        size = self._loader.size
        self._window.append((record, _Computed(size.tokens, self._flops.of(size))))
        self._num_tokens += size.tokens
        self._num_targets += record.num_tokens
        self._seconds += record.seconds
        self._skipped += record.skipped
        return self._line(by_rank) if self.is_due(record.step) else None

    def rest(self) -> Metrics:
        """Return metrics of the steps since the last line, at least one, for a run that ends early."""
        return self._line(with_lanes=False)

    def _line(self, by_rank: Sequence[Mapping[str, Any]] = (), *, with_lanes: bool = True) -> Metrics:
        record = self._window[-1][0]
        window, self._window = self._window, []
        learned = [r for r, _ in window if not r.skipped]
        weight = sum(r.weight for r in learned)
        seconds = sum(r.seconds for r, _ in window)
        speed = sum(done.tokens for _, done in window) / seconds
        return Metrics(
            step=record.step,
            epoch=record.epoch,
            loss=sum(r.loss * r.weight for r in learned) / weight if weight else math.nan,
            grad_norm=record.grad_norm,
            learning_rate=record.learning_rate,
            tokens_per_second=speed,
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
            preferences=means(added(r.sums for r in learned)),
            ranks=figures_of_all(by_rank, len(window), speed) if by_rank else {},
        )


def _saved(record: StepRecord) -> dict[str, Any]:
    values: dict[str, Any] = finite_or_none(asdict(record))
    return values if record.num_samples else _without(values)


def lane_shares(spans: Iterable[Span], seconds: float) -> dict[str, float]:
    """Return the busy share of each lane in `seconds`; empty if nothing was recorded."""
    return {name: min(1.0, busy / seconds) for name, busy in sorted(busy_seconds(spans).items())}


class MetricsFile:
    """metrics.jsonl as it is written: each line reaches the system before the call returns.

    The file does not exist before the first step: then `begin` prepares the folder, an earlier file is
    replaced, and `header` becomes the first line. Leaving the context writes the line `end`.

    Lines that a full or failing disk rejects are kept, at most `_MOST_UNWRITTEN` bytes, and written with the
    next one if possible. `warn` gets the first error, and at the end the number of lost lines.
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
        """resumed_at: append to the file of a run that continues after this step."""
        self._path, self._begin, self._header, self._resumed_at = path, begin, header, resumed_at
        self._warn = warn
        self._file: TextIO | None = None
        self._unwritten = bytearray()
        self._num_dropped = 0
        self._fault = ""
        self.step = resumed_at or 0  # last step done, logged or not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._file is None:
            return
        self._write("end", {**_ending(error), "step": self.step})
        missing = self._num_dropped + self._unwritten.count(b"\n")
        if missing:
            self._warn(f"{self._path} lacks {count(missing, 'line')}: {self._fault}")
        with suppress(OSError):  # a network file system may report errors here
            self._file.close()

    def open(self) -> None:
        """Begin the run's folder and the file, unless done. Raises DoesNotFitError if the disk is full."""
        if self._file is None:
            self._begin()
            goes_on = self._resumed_at is not None and self._path.exists()
            with writing(self._path):
                self._file = files.open_log(self._path, goes_on=goes_on)
            self._write("start", self._header)
            if self._resumed_at is not None:
                self._write("resume", {"step": self._resumed_at})

    def write_step(self, metrics: Metrics) -> None:
        """Append a line `step`."""
        self.open()
        self._write("step", metrics.to_line())

    def write_event(self, event: str, values: dict[str, Any]) -> None:
        """Append a line of another kind; dropped before the first step, when there is no file."""
        if self._file is not None:
            self._write(event, values)

    @property
    def has_begun(self) -> bool:
        """Return whether the file exists: true from the first step on."""
        return self._file is not None

    def write_timeline(self, step: int, spans: Sequence[Span]) -> None:
        """Append the spans of a step as [op, lane, start, end], in seconds."""
        rows = [[str(op), str(op.lane), round(start, 7), round(end, 7)] for op, start, end in spans]
        self._write("timeline", {"step": step, "spans": rows})

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Append a line `eval`. The file must be open: `training.log` holds evaluations before step 1."""
        self._write("eval", evaluation.to_line())

    def _write(self, event: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, **{key: finite_or_none(value) for key, value in values.items()}, "time": now}
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def _append(self, line: bytes) -> None:
        """Write unwritten lines and this one, from the byte at which the disk failed."""
        assert self._file is not None
        if len(self._unwritten) + len(line) > _MOST_UNWRITTEN:
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


class SilentFile(MetricsFile):
    """metrics.jsonl on a rank that does not write it."""

    def __init__(self) -> None:
        super().__init__(Path(), begin=lambda: None, header={})

    def open(self) -> None:
        """Open nothing."""

    def _write(self, event: str, values: dict[str, Any]) -> None:
        """Write nothing."""


def _ending(error: BaseException | None) -> dict[str, Any]:
    """Return the fields of the line `end`."""
    if error is None:
        return {"status": "finished"}
    if isinstance(error, StoppedError):
        return {"status": "interrupted", "error": None, "reason": error.message}
    if isinstance(error, KeyboardInterrupt | SystemExit):
        who = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "a second signal"
        return {"status": "interrupted", "error": None, "reason": f"{who} ended the run within a step"}
    return {"status": "failed", "error": str(error) or type(error).__name__}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the lines `step`, without undone steps and a truncated last line (a killed run)."""
    return still_true(read_lines(path), "step")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Read the lines `eval`, without undone steps."""
    return still_true(read_lines(path), "eval")


def still_true(lines: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """Return the lines of a kind, without steps that a later rollback or resume undid."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == event:
            found.append(line)
        elif line.get("event") in ("rollback", "resume"):
            found = [earlier for earlier in found if earlier["step"] <= line["step"]]
    return found


def mean_of_tail(steps: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss of the last tenth of the finite records (single steps are noisy), or NaN."""
    losses = [line["loss"] for line in steps if line.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file, without a truncated last one. Raises DataError, OSError."""
    try:
        lines = files.read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is damaged: {error.reason} at byte {error.start:,}", hint=REMOVE_LINE
        ) from None
    last = len(lines) if lines[-1] else len(lines) - 1
    for number, line in enumerate(lines[:last], start=1):
        try:
            found = json.loads(line, parse_constant=_not_finite)
        except (ValueError, RecursionError) as error:
            if number == last:
                return
            why = getattr(error, "msg", error)
            raise DataError(f"{path}:{number} is damaged: {why}", hint=REMOVE_LINE) from None
        yield check(found, f"{path}:{number}")


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def versions() -> dict[str, str]:
    """Return versions of Python and of the packages that affect the numbers."""
    return {"python": platform.python_version(), "horizon-lm": VERSION, **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Return versions of packages; each is read from a file that takes 5 ms to parse."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # a source folder
            found[name] = version(name)
    return found


def device_bytes(model: HostModel) -> int:
    """Return peak bytes on a CUDA device, else the size of slots outside the store."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return bytes_of_slots(model.memory_bytes())


def finite_or_none(value: Any) -> Any:
    """Replace numbers that are not finite by None, for JSON."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
