"""Schedule executors. All honour the same derived waits, and run `W` ops on a `DiskLane`.

    InlineLanes  one thread, program order; CPU default, CudaLanes reference
    CudaLanes    one thread per lane (`LaneThread`); streams for upload, compute, download, device update,
                 network

Tests add a third (`tests/helpers/adversarial.py`): random legal order, which exposes missing waits.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Protocol

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.lane_thread import LaneThread, Latch
from horizon_lm.errors import ConfigError
from horizon_lm.schedule import Lane, Op

Execute = Callable[[int], None]
Waits = Sequence[tuple[int, ...]]
Span = tuple[Op, float, float]  # op, start and end in seconds since the run began
# Is given the tensors behind a buffer that nothing reads any more, before they are dropped.
OnRelease = Callable[[list[torch.Tensor]], None]
_LOOK_SECONDS = 1.0  # between two checks that all lanes are alive
_EXIT_SECONDS = 1.0  # how long the end of the process waits for idle lanes


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
    """One thread per lane. Upload, compute, network, download and device update each issue to their own
    stream, ordered by events; the update lane runs on the CPU and waits for events.

    A thread starts when its lane first has ops, and serves all later runs until this object is collected.
    """

    in_place = False
    on_release: OnRelease | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()
        self.streams = {
            lane: torch.cuda.Stream(device, priority=priority) for lane, priority in _PRIORITIES.items()
        }
        self._threads: dict[Lane, LaneThread] = {}
        self._events: dict[tuple[str, bool], list[torch.cuda.Event]] = defaultdict(list)
        self._process = os.getpid()
        self._last: _CudaRun | None = None
        _all.add(self)
        weakref.finalize(self, _end, self._threads).atexit = False  # `_end_all` does

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        self.join()
        self.spans = []
        run = self._last = _CudaRun(self, ops, waits, indices, execute, record)
        self.origin = run.origin_seconds
        run.complete()
        self._last = None
        self.spans = run.spans()

    def join(self) -> None:
        if self._process != os.getpid():  # forked: the threads and their work are in the parent
            self._threads.clear()
            self._process, self._last = os.getpid(), None
        if self._last is not None:
            self._last.abandon()
            with suppress(RuntimeError):  # an error of the device is raised again later
                torch.cuda.synchronize(self.device)
            self._last = None

    def thread(self, lane: Lane) -> LaneThread:
        """Return the thread of a lane; start one if there is none, or if the last one is unusable."""
        thread = self._threads.get(lane)
        if thread is None or not thread.is_usable:
            if thread is not None:
                thread.end()  # an interrupt may have delayed its start
            thread = self._threads[lane] = LaneThread(f"horizon-{lane}")
            thread.start()
        return thread

    def events(self, use: str, count: int, *, timing: bool) -> list[torch.cuda.Event]:
        """Return events for one run. Runs reuse them, since nothing waits for those of an earlier run.

        blocking: a waiting host thread sleeps and leaves its core to others.
        """
        made = self._events[use, timing]
        while len(made) < count:
            made.append(torch.cuda.Event(enable_timing=timing, blocking=True))
        return made[:count]


# Stream priorities; torch's lowest is 0. Casts and norms of downloads, sums over ranks and updates yield to
# the compute lane's kernels.
_PRIORITIES = {
    Lane.UPLOAD: 0,
    Lane.COMPUTE: -1,
    Lane.NETWORK: 0,
    Lane.DOWNLOAD: 0,
    Lane.DEVICE_UPDATE: 0,
}
_all: weakref.WeakSet[CudaLanes] = weakref.WeakSet()


def _end(threads: dict[Lane, LaneThread]) -> None:
    for thread in threads.values():
        thread.end()


@atexit.register
def _end_all() -> None:
    """Let idle threads end before CUDA shuts down; a stuck thread dies with the process."""
    threads = [t for lanes in _all if lanes._process == os.getpid() for t in lanes._threads.values()]
    deadline = time.monotonic() + _EXIT_SECONDS
    for thread in threads:
        thread.end()
    for thread in threads:
        thread.wait(max(0.0, deadline - time.monotonic()))


def _is_as_new() -> bool:
    """Whether torch's state in this thread is that of a new thread; user code may have changed it."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
    )


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
        self.thread_of = lanes.thread
        self.host_threads = torch.get_num_threads()
        # The caller's settings of torch's compiler, which since torch 2.12 belong to a thread.
        self.context = contextvars.copy_context()
        self.issued = {i: Latch() for i in indices}
        on_device = [i for i in indices if ops[i].lane in self.streams]
        self.ended = dict(zip(on_device, lanes.events("ended", len(on_device), timing=record), strict=True))
        timed = on_device if record else []
        self.began = dict(zip(timed, lanes.events("began", len(timed), timing=True), strict=True))
        self.host_times: dict[int, tuple[float, float]] = {}
        self.done: deque[Op] = deque(maxlen=8)
        self.failure: BaseException | None = None
        self.mine: dict[Lane, list[int]] = defaultdict(list)
        for i in indices:
            self.mine[ops[i].lane].append(i)
        self.threads: dict[Lane, LaneThread] = {}
        self.at_work: set[Lane] = set()
        self.over = {lane: Latch() for lane in self.mine}
        # Work that the caller issued comes first; all earlier runs have ended.
        (self.origin,) = lanes.events("origin", 1, timing=record)
        self.origin.record(torch.cuda.current_stream(self.device))
        if record:
            self.origin.synchronize()  # so that device and host clocks start together
        self.origin_seconds = time.perf_counter()

    def _live(self, lane: Lane) -> bool:
        """Run a lane; return whether its thread may be reused."""
        self.at_work.add(lane)
        try:
            if torch.get_num_threads() != self.host_threads:  # a thread keeps the number that it started with
                torch.set_num_threads(self.host_threads)
            self.context.copy().run(self._lane, lane, self.mine[lane])
        except BaseException as error:  # surfaces in the calling thread, in complete()
            self._fail(error)
            return False
        return _is_as_new()

    def _lane(self, lane: Lane, mine: list[int]) -> None:
        torch.cuda.set_device(self.device)
        stream = self.streams.get(lane)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            if stream is not None:
                stream.wait_event(self.origin)
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

    def _fail(self, error: BaseException) -> None:
        """Stop all lanes: each checks for a failure before its next op, and none is left waiting."""
        if self.failure is None:
            self.failure = error
        for latch in self.issued.values():
            latch.set()

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
            self.threads = {lane: self.thread_of(lane) for lane in self.mine}
            for lane, thread in self.threads.items():
                thread.do(partial(self._live, lane), self.over[lane])
            for over in self.over.values():
                while not over.wait_for(_LOOK_SECONDS):
                    self._look_for_dead_lanes()
                self._look_for_dead_lanes()
            if self.failure is None:
                self._wait_for_device()
        except BaseException as error:  # KeyboardInterrupt, or a thread that cannot be started
            self.abandon(error)
        if self.failure is not None:
            with suppress(RuntimeError):  # the first failure tells more than what the device says later
                torch.cuda.synchronize(self.device)
            raise self.failure

    def _wait_for_device(self) -> None:
        """Wait for the last op of each stream, and so for all: the caller may read results on any stream."""
        for lane in self.streams.keys() & self.mine.keys():
            self.ended[self.mine[lane][-1]].synchronize()

    def abandon(self, error: BaseException | None = None) -> None:
        """Let each lane finish its current op and stop; return when all have.

        A lane that had not begun finds the failure before its first op.
        """
        self._fail(error or RuntimeError("the run was interrupted"))
        for lane in self.at_work.copy():
            while not self.over[lane].wait_for(_LOOK_SECONDS) and not self.threads[lane].is_dead:
                self._fail(RuntimeError())  # wakes lanes that an interrupted call did not reach

    def _look_for_dead_lanes(self) -> None:
        """Fail if a lane's thread died silently, so that the others do not wait for its ops. A thread that
        died before it began is replaced."""
        for lane, thread in self.threads.items():
            if thread.is_dead and not self.over[lane].is_set:
                if lane not in self.at_work:
                    self.threads[lane] = self.thread_of(lane)
                    self.threads[lane].do(partial(self._live, lane), self.over[lane])
                    continue
                self.over[lane].set()
            rest = [i for i in self.mine[lane] if not self.issued[i].is_set]
            if rest and self.over[lane].is_set:
                error = RuntimeError(f"the thread of the lane {thread.name} is gone")
                in_op(error, self.ops[rest[0]], list(self.done))
                self._fail(error)  # an earlier failure stays

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
