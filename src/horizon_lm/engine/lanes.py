"""The executors of a schedule: streams, events, and the lanes' threads.

All run the same ops with the same derived waits (`W`, the writing of a checkpoint, on a `DiskLane`):

    InlineLanes       one thread, program order (the CPU; on CUDA, the reference for CudaLanes)
    AdversarialLanes  one thread, any order that the waits allow, chosen at random (tests)
    CudaLanes         a thread for each lane; a CUDA stream for upload, compute and download
"""

from __future__ import annotations

import random
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
# Lanes whose ops are the CPU's own work, on memory that copies of the other lanes read and write.
HOST_LANES = frozenset({Lane.HOST, Lane.UPDATE})
_LOOK_SECONDS = 1.0  # between two looks at whether all lanes are still alive


def reads_on_this_lane(tensor: torch.Tensor) -> None:
    """Say that the lane which calls reads a tensor that another lane's work allocated, so that its memory
    is not given out again before the lane has done so."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def in_op(error: BaseException, op: Op, ended: Sequence[Op]) -> None:
    """Note on an error in which op it arose, and what had ended just before."""
    note = f"in op {op} ({op.lane} lane, step {op.step})"
    if ended:
        note += ", after " + " ".join(str(other) for other in ended[-8:])
    if not any(earlier.startswith("in op ") for earlier in getattr(error, "__notes__", ())):
        error.add_note(note)  # else it comes from the disk lane, and arose in the op that is noted


class Lanes(Protocol):
    """Runs the ops of a range in an order that the waits allow, and returns when all have ended but those
    of the disk lane, which go on in `disk`.

    spans: what ran when, of the last `run`; empty unless it was called with record=True.
    origin: when that run began, in seconds of `time.perf_counter`.
    """

    spans: list[Span]
    origin: float
    disk: DiskLane

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None: ...

    def join(self) -> None:
        """Stop, and wait for, what is still at work after a `run` that was interrupted."""


class InlineLanes:
    """Program order in the calling thread, and on one stream where the device is CUDA. clock: seconds, for
    spans."""

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
            if ops[i].lane in HOST_LANES:
                self._settle()
            self.disk.settle(ops[i].writes)
            start = self._clock()
            _noted(execute, i, ops)
            if record:
                self._settle()
                self.spans.append((ops[i], start - self.origin, self._clock() - self.origin))
        self._settle()

    def join(self) -> None:
        """Nothing is: the ops run in the thread that calls."""

    def _settle(self) -> None:
        """Wait for what was issued to a CUDA device; the CPU has ended its work already."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)


def _noted(execute: Execute, i: int, ops: Sequence[Op]) -> None:
    try:
        execute(i)
    except BaseException as error:
        in_op(error, ops[i], ops[max(0, i - 8) : i])
        raise


class AdversarialLanes:
    """Ready ops in random order: a wait that is missing shows up as wrong numbers, without a GPU."""

    def __init__(self, seed: int = 0) -> None:
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()  # its ops are run by the calling thread, like all others
        self.random = random.Random(seed)
        self.order: list[int] = []

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        queues: dict[Lane, deque[int]] = defaultdict(deque)
        for i in indices:
            queues[ops[i].lane].append(i)
        pending = set(indices)
        self.order = []
        while pending:
            ready = [q[0] for q in queues.values() if q and not any(j in pending for j in waits[q[0]])]
            assert ready, "the schedule is deadlocked"
            i = self.random.choice(ready)
            self.disk.settle(ops[i].writes)
            try:
                execute(i)
            except BaseException as error:
                in_op(error, ops[i], [ops[j] for j in self.order])
                raise
            queues[ops[i].lane].popleft()
            pending.discard(i)
            self.order.append(i)

    def join(self) -> None:
        """Nothing is: the ops run in the thread that calls."""


class CudaLanes:
    """A thread for each lane. Upload, compute and download issue to a stream of their own and
    order themselves by events; host and update lanes run on the CPU and wait for events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()
        self._streams = {
            lane: torch.cuda.Stream(device) for lane in (Lane.UPLOAD, Lane.COMPUTE, Lane.DOWNLOAD)
        }
        self._last: _CudaRun | None = None

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        self.join()
        torch.cuda.synchronize(self.device)  # nothing of an earlier range, or of the caller, is in flight
        self.spans = []
        run = self._last = _CudaRun(
            self.device, self._streams, self.disk, ops, waits, indices, execute, record
        )
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
        device: torch.device,
        streams: dict[Lane, torch.cuda.Stream],
        disk: DiskLane,
        ops: Sequence[Op],
        waits: Waits,
        indices: range,
        execute: Execute,
        record: bool,
    ) -> None:
        self.device, self.streams, self.disk = device, streams, disk
        self.ops, self.waits, self.indices, self.execute = ops, waits, indices, execute
        self.record = record
        self.issued = {i: threading.Event() for i in indices}
        # blocking: a host thread that waits for one sleeps, and leaves its core to the others
        self.ended = {
            i: torch.cuda.Event(enable_timing=record, blocking=True)
            for i in indices
            if ops[i].lane in streams
        }
        self.began = {i: torch.cuda.Event(enable_timing=True) for i in self.ended} if record else {}
        self.host_times: dict[int, tuple[float, float]] = {}
        self.done: deque[Op] = deque(maxlen=8)
        self.failure: BaseException | None = None
        self.origin = torch.cuda.Event(enable_timing=True)
        self.origin.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        self.origin_seconds = time.perf_counter()
        by_lane: dict[Lane, list[int]] = defaultdict(list)
        for i in indices:
            by_lane[ops[i].lane].append(i)
        self.mine = {f"horizon-{lane}": mine for lane, mine in by_lane.items()}
        # An interrupt of `Thread.join` makes Python 3.11 take the thread for ended while it is at work.
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
        """Stop all lanes: each looks for a failure before its next op, and none is left waiting."""
        if self.failure is None:
            self.failure = error
        for event in self.issued.values():
            event.set()

    def _wait_for(self, i: int, stream: torch.cuda.Stream | None) -> bool:
        for j in self.waits[i]:
            if j not in self.issued:
                continue  # of an earlier range, which has ended
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
        if op.lane is Lane.DISK:  # in order behind what it waits for; it may outlive this run
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
        """Run all lanes to their end; raise what one of them raised, or what interrupted the wait.

        No lane is at work any more when this returns or raises, unless the wait for that is interrupted
        too: whoever wants the process to end need not wait for a device that hangs.
        """
        try:
            for thread in self.threads:
                thread.start()
            for thread in self.threads:
                while not self.gone[thread.name].wait(_LOOK_SECONDS):
                    self._look_for_dead_lanes()
                self._look_for_dead_lanes()
                thread.join()
        except BaseException as error:  # a KeyboardInterrupt, or no thread to be had
            self.abandon(error)
        if self.failure is not None:
            with suppress(RuntimeError):  # what failed first tells more than what the device says after it
                torch.cuda.synchronize(self.device)
            raise self.failure
        torch.cuda.synchronize(self.device)

    def abandon(self, error: BaseException | None = None) -> None:
        """Let each lane end the op that it is in, and no more; return when all have."""
        self._fail(error or RuntimeError("the run was interrupted"))
        for thread in self.threads:
            if thread.ident is not None:  # one that starts later finds the failure
                self.gone[thread.name].wait()

    def _look_for_dead_lanes(self) -> None:
        """A lane whose thread is gone without a word must not leave the others waiting for its ops."""
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


def choose_lanes(kind: str, device: torch.device, seed: int = 0) -> Lanes:
    """The executor for a device: `auto` is inline on the CPU and streams on CUDA.

    Raises ConfigError for lanes that the device cannot have.
    """
    if kind == "auto":
        kind = "cuda" if device.type == "cuda" else "inline"
    needed = {"cuda": "cuda", "adversarial": "cpu"}.get(kind, device.type)
    if device.type != needed:
        raise ConfigError(
            f"lanes={kind!r} do not run on device={str(device)!r}", hint=f"device: {needed}, or lanes: auto"
        )
    table: dict[str, Callable[[], Lanes]] = {
        "inline": lambda: InlineLanes(device),
        "adversarial": lambda: AdversarialLanes(seed),
        "cuda": lambda: CudaLanes(device),
    }
    return table[kind]()
