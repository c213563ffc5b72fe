"""Schedule executors. All honour the same derived waits, and run `W` ops on a `DiskLane`.

    InlineLanes  one thread, program order; CPU default, CudaLanes reference
    CudaLanes    one thread per lane; streams for upload, compute, download

Tests add a third (`tests/helpers/adversarial.py`): random legal order, which exposes missing waits.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Protocol

import torch

from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.errors import ConfigError
from horizon_lm.schedule import Lane, Op

Execute = Callable[[int], None]
Waits = Sequence[tuple[int, ...]]
Span = tuple[Op, float, float]  # op, start and end in seconds since the run began
# Is given the tensors behind a buffer that nothing reads any more, before they are dropped.
OnRelease = Callable[[list[torch.Tensor]], None]
_LOOK_SECONDS = 1.0  # between two checks that all lanes are alive


def reads_on_this_lane(tensor: torch.Tensor) -> None:
    """Keep a tensor that another lane allocated from being reused before the calling lane has read it."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def in_op(error: BaseException, op: Op, ended: Sequence[Op]) -> None:
    """Add to an error the op that raised it, and the ops that ended just before."""
    note = f"in op {op} ({op.lane} lane, step {op.step})"
    if ended:
        note += ", after " + " ".join(str(other) for other in ended[-8:])
    if not any(earlier.startswith("in op ") for earlier in getattr(error, "__notes__", ())):
        error.add_note(note)  # else it comes from the disk lane, and the note names its op already


class Lanes(Protocol):
    """Runs a range of ops in an order that the waits allow; returns when all have ended, except those of the
    disk lane, which go on in `disk`.

    in_place: ops run in program order in one thread, so on the CPU slots may alias host memory.
    on_release: called after the last use of each buffer (None: not needed).
    spans: timeline of the last `run`; empty unless it had record=True.
    origin: start of that run, in seconds of `time.perf_counter`.
    """

    in_place: bool
    on_release: OnRelease | None
    spans: list[Span]
    origin: float
    disk: DiskLane

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None: ...

    def join(self) -> None:
        """Stop what an interrupted `run` left running, and wait for it."""


class InlineLanes:
    """Program order in the calling thread; on a CUDA device, on one stream. clock: seconds, for spans."""

    in_place = True
    on_release: OnRelease | None = None

    def __init__(
        self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()
        self._cuda = device if device is not None and device.type == "cuda" else None

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        self.spans = []
        self._settle()
        self.origin = self._clock()
        for i in indices:
            if ops[i].lane is Lane.DISK:
                self._settle()
                self.disk.submit(ops[i].reads, partial(_noted, execute, i, ops))
                continue
            if ops[i].lane is Lane.UPDATE:  # on the CPU, on memory that copies of other lanes read and write
                self._settle()
            self.disk.settle(ops[i].writes)
            start = self._clock()
            _noted(execute, i, ops)
            if record:
                self._settle()
                self.spans.append((ops[i], start - self.origin, self._clock() - self.origin))
        self._settle()

    def join(self) -> None:
        """Do nothing: ops run in the calling thread."""

    def _settle(self) -> None:
        """Wait for what was issued to a CUDA device; CPU work has ended already."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)


def _noted(execute: Execute, i: int, ops: Sequence[Op]) -> None:
    try:
        execute(i)
    except BaseException as error:
        in_op(error, ops[i], ops[max(0, i - 8) : i])
        raise


class CudaLanes:
    """One thread per lane. Upload, compute and download each issue to their own stream, ordered by events;
    the update lane runs on the CPU and waits for events."""

    in_place = False
    on_release: OnRelease | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()
        self.streams = {
            lane: torch.cuda.Stream(device) for lane in (Lane.UPLOAD, Lane.COMPUTE, Lane.DOWNLOAD)
        }
        self._last: _CudaRun | None = None

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        self.join()
        torch.cuda.synchronize(self.device)  # earlier ranges and the caller have nothing in flight
        self.spans = []
        run = self._last = _CudaRun(self, ops, waits, indices, execute, record)
        self.origin = run.origin_seconds
        run.complete()
        self._last = None
        self.spans = run.spans()

    def join(self) -> None:
        if self._last is not None:
            self._last.abandon()
            self._last = None


class _CudaRun:
    """One range of ops in flight."""

    def __init__(
        self,
        lanes: CudaLanes,
        ops: Sequence[Op],
        waits: Waits,
        indices: range,
        execute: Execute,
        record: bool,
    ) -> None:
        self.device, self.streams, self.disk = lanes.device, lanes.streams, lanes.disk
        self.ops, self.waits, self.indices, self.execute = ops, waits, indices, execute
        self.record = record
        self.issued = {i: threading.Event() for i in indices}
        # blocking: a host thread that waits sleeps, and leaves its core to others
        self.ended = {
            i: torch.cuda.Event(enable_timing=record, blocking=True)
            for i in indices
            if ops[i].lane in self.streams
        }
        self.began = {i: torch.cuda.Event(enable_timing=True) for i in self.ended} if record else {}
        self.host_times: dict[int, tuple[float, float]] = {}
        self.done: deque[Op] = deque(maxlen=8)
        self.failure: BaseException | None = None
        self.origin = torch.cuda.Event(enable_timing=True)
        self.origin.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        self.origin_seconds = time.perf_counter()
        by_lane: dict[Lane, list[int]] = defaultdict(list)
        for i in indices:
            by_lane[ops[i].lane].append(i)
        self.mine = {f"horizon-{lane}": mine for lane, mine in by_lane.items()}
        # After an interrupted `Thread.join`, Python 3.11 takes a running thread for ended.
        self.gone = {name: threading.Event() for name in self.mine}
        self.threads = [
            threading.Thread(target=self._live, args=(lane, mine), name=f"horizon-{lane}", daemon=True)
            for lane, mine in by_lane.items()
        ]

    def _live(self, lane: Lane, mine: list[int]) -> None:
        try:
            self._lane(lane, mine)
        finally:
            self.gone[f"horizon-{lane}"].set()

    def _lane(self, lane: Lane, mine: list[int]) -> None:
        try:
            torch.cuda.set_device(self.device)
            stream = self.streams.get(lane)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                for i in mine:
                    if not self._wait_for(i, stream):
                        return
                    try:
                        self._execute(i, stream)
                    except BaseException as error:
                        in_op(error, self.ops[i], list(self.done))
                        raise
                    self.done.append(self.ops[i])
                    self.issued[i].set()
        except BaseException as error:  # surfaces in the calling thread, in complete()
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Stop all lanes: each checks for a failure before its next op, and none is left waiting."""
        if self.failure is None:
            self.failure = error
        for event in self.issued.values():
            event.set()

    def _wait_for(self, i: int, stream: torch.cuda.Stream | None) -> bool:
        for j in self.waits[i]:
            if j not in self.issued:
                continue  # an earlier range, which has ended
            self.issued[j].wait()
            if self.failure is not None:
                return False
            if j in self.ended:
                if stream is not None:
                    stream.wait_event(self.ended[j])
                else:
                    self.ended[j].synchronize()
        return self.failure is None

    def _execute(self, i: int, stream: torch.cuda.Stream | None) -> None:
        op = self.ops[i]
        if op.lane is Lane.DISK:  # submitted once its waits are over; may outlive this run
            self.disk.submit(op.reads, partial(_noted, self.execute, i, self.ops))
            return
        self.disk.settle(op.writes)
        if stream is None:
            start = time.perf_counter()
            self.execute(i)
            self.host_times[i] = (start - self.origin_seconds, time.perf_counter() - self.origin_seconds)
            return
        if self.record:
            self.began[i].record(stream)
        self.execute(i)
        self.ended[i].record(stream)

    def complete(self) -> None:
        """Run all lanes to their end; raise what a lane raised, or what interrupted the wait.

        No lane is running when this returns or raises, unless the wait for that is interrupted too, so
        that a process can be ended although its device hangs.
        """
        try:
            for thread in self.threads:
                thread.start()
            for thread in self.threads:
                while not self.gone[thread.name].wait(_LOOK_SECONDS):
                    self._look_for_dead_lanes()
                self._look_for_dead_lanes()
                thread.join()
        except BaseException as error:  # KeyboardInterrupt, or a thread that cannot be started
            self.abandon(error)
        if self.failure is not None:
            with suppress(RuntimeError):  # the first failure tells more than what the device says later
                torch.cuda.synchronize(self.device)
            raise self.failure
        torch.cuda.synchronize(self.device)

    def abandon(self, error: BaseException | None = None) -> None:
        """Let each lane end its current op and no more; return when all have."""
        self._fail(error or RuntimeError("the run was interrupted"))
        for thread in self.threads:
            if thread.ident is not None:  # a thread that starts later finds the failure
                self.gone[thread.name].wait()

    def _look_for_dead_lanes(self) -> None:
        """Fail if a lane's thread died silently, so that the others do not wait for its ops."""
        for thread in self.threads:
            if not self.gone[thread.name].is_set():
                continue
            rest = [i for i in self.mine[thread.name] if not self.issued[i].is_set()]
            if rest and self.failure is None:
                error = RuntimeError(f"the thread of the lane {thread.name} is gone")
                in_op(error, self.ops[rest[0]], list(self.done))
                self._fail(error)

    def spans(self) -> list[Span]:
        if not self.record:
            return []
        found = [(self.ops[i], *times) for i, times in self.host_times.items()]
        for i, end in self.ended.items():
            start = self.origin.elapsed_time(self.began[i]) / 1e3
            found.append((self.ops[i], start, self.origin.elapsed_time(end) / 1e3))
        return sorted(found, key=lambda span: span[1])


def choose_lanes(kind: str, device: torch.device) -> Lanes:
    """Return the executor for a device: `auto` is inline on the CPU and streams on CUDA.

    Raises ConfigError for lanes that the device does not support.
    """
    if kind == "auto":
        kind = "cuda" if device.type == "cuda" else "inline"
    if kind == "inline":
        return InlineLanes(device)
    if device.type != "cuda":
        raise ConfigError(
            f"lanes={kind!r} do not run on device={str(device)!r}", hint="set device: cuda, or lanes: auto"
        )
    return CudaLanes(device)
