"""Lane threads live as long as their lanes: what they keep, what ends them, and what strikes them."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda as fake
import zoo
from fake_cuda import Watch
from fake_cuda import fake_cuda as fake_cuda
from faulty_runs import Injected, model_on, with_cuda_lanes
from horizon_lm.engine import lanes as lanes_module
from horizon_lm.engine.lane_thread import LaneThread
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.schedule import Buffer, Lane, Op, StepSpec, build, derive_waits
from moments import Moments
from sizes import times

CPU = torch.device("cpu")
SECONDS = 10.0  # within which whatever is waited for must happen
SPEC = StepSpec(
    layers=2, uploaded=frozenset({1, 2, 3}), trainable=frozenset({1, 2, 3}), embedding_unit=3, micro_batches=2
)
OPS = build(SPEC)
WAITS = derive_waits(OPS)
ALL = range(len(OPS))

pytestmark = pytest.mark.usefixtures("fake_cuda", "one_thread")


def idents(lanes: CudaLanes, **settings: Any) -> dict[Lane, set[int]]:
    """Run all ops; return the threads that each lane's ops ran in."""
    found: dict[Lane, set[int]] = {}
    lanes.run(
        OPS, WAITS, ALL, lambda i: found.setdefault(OPS[i].lane, set()).add(threading.get_ident()), **settings
    )
    return found


def alive(threads: list[LaneThread]) -> list[str]:
    """Those that are still there a moment later."""
    deadline = time.monotonic() + SECONDS
    while (left := [t.name for t in threads if t._thread.is_alive()]) and time.monotonic() < deadline:
        time.sleep(0.005)
    return left


def threads_of(lanes: CudaLanes) -> list[LaneThread]:
    return list(lanes._threads.values())


# They serve every run, and keep nothing.


def test_a_lane_has_one_thread_for_all_runs() -> None:
    lanes = CudaLanes(CPU)
    assert not lanes._threads
    first = idents(lanes)
    assert all(len(found) == 1 for found in first.values()) and len(first) == len(lanes._threads)
    for _ in range(3):
        assert idents(lanes, record=True) == first
    uploads = [i for i in ALL if OPS[i].lane is Lane.UPLOAD]
    fresh = CudaLanes(CPU)
    fresh.run(OPS, [()] * len(OPS), range(uploads[0], uploads[0] + 1), lambda i: None)
    assert set(fresh._threads) == {Lane.UPLOAD}  # a lane without ops has none
    assert not set.union(*first.values()) & {t._thread.ident for t in threads_of(fresh)}


def test_a_model_trains_in_the_same_threads() -> None:
    """And `close` ends them, as it frees everything else."""
    model = model_on("adversarial")
    with_cuda_lanes(model)
    batch = [zoo.batch("llama", batch_size=1, length=8, seed=1)]
    for _ in range(2):
        model.train_step(batch, lr=1e-3)
    lanes = model.engine.lanes
    before = {lane: t._thread.ident for lane, t in lanes._threads.items()}
    made = fake.Event.made
    for _ in range(2):
        model.train_step(batch, lr=1e-3)
    assert {lane: t._thread.ident for lane, t in lanes._threads.items()} == before
    assert fake.Event.made == made, "events are made once"
    threads, gone = threads_of(lanes), weakref.ref(lanes)
    del lanes
    model.close()
    assert gone() is None and not alive(threads)


def kept_between_runs() -> bool:
    """Whether anything of a run outlives it while its threads idle."""
    lanes, tensor = CudaLanes(CPU), torch.zeros(3)
    weak = weakref.ref(tensor)
    runs: list[weakref.ref] = []

    def execute(i: int, tensor: torch.Tensor = tensor) -> None:
        runs.append(weakref.ref(lanes._last))

    lanes.run(OPS, WAITS, ALL, execute)
    del tensor, execute
    deadline = time.monotonic() + 0.5  # a thread sets the last event, then forgets its task
    while (kept := weak() is not None or runs[0]() is not None) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    assert not any(t.is_dead for t in threads_of(lanes))
    return kept


def test_nothing_of_a_run_is_kept_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kept_between_runs()

    def serve(self: LaneThread) -> None:  # the control: it forgets its task when the next one comes
        with self._lives:
            self._has_begun = True
            while (task := self._tasks.get()) is not None:
                self._may_go_on = task[0]()
                task[1].set()

    monkeypatch.setattr(LaneThread, "_serve", serve)
    assert kept_between_runs()


def test_lanes_that_are_dropped_end_their_threads() -> None:
    """Without the help of the garbage collector; those of other lanes stay."""
    one, other = CudaLanes(CPU), CudaLanes(CPU)
    idents(one), idents(other)
    threads, gone = threads_of(one), weakref.ref(one)
    gc.disable()
    try:
        del one
        assert gone() is None and not alive(threads)
    finally:
        gc.enable()
    assert idents(other) == {lane: {t._thread.ident} for lane, t in other._threads.items()}


# The state of torch that belongs to a thread.


def states(leave: Callable[[], object], *, fails: bool) -> list[tuple[bool, ...]]:
    """What the ops of a run find after an op of the run before has left its thread in another state."""
    lanes, found = CudaLanes(CPU), []
    victim = next(i for i in reversed(ALL) if OPS[i].lane is Lane.COMPUTE)

    def execute(i: int) -> None:
        if i == victim:
            leave()
            if fails:
                raise Injected

    def look(i: int) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found.append((*modes, torch.get_default_device().type == "cpu"))

    with suppress(Injected):
        lanes.run(OPS, WAITS, ALL, execute)
    lanes.run(OPS, WAITS, ALL, look)
    return found


_open: list[Any] = []  # for good: a mode that is collected ends, in whatever thread


def enter(mode: Any) -> None:
    _open.append(mode)
    mode.__enter__()


LEFT: dict[str, Callable[[], object]] = {
    "no gradients": lambda: torch.set_grad_enabled(False),
    "inference": lambda: enter(torch.inference_mode()),
    "autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
}


NEW = (True, False, False, True)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("what", LEFT)
def test_a_run_finds_threads_as_new(what: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(states(LEFT[what], fails=fails)) == {NEW}
    monkeypatch.setattr(lanes_module, "_is_as_new", lambda: True)
    # The control: only an error ends a thread.
    assert (set(states(LEFT[what], fails=fails)) == {NEW}) is fails


def test_a_device_that_an_op_makes_the_default_is_forgotten() -> None:
    try:
        assert set(states(lambda: torch.set_default_device("meta"), fails=True)) == {NEW}
    finally:
        torch.set_default_device(None)


def test_a_thread_takes_up_the_callers_number_of_threads() -> None:
    lanes = CudaLanes(CPU)
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        found: set[int] = set()
        lanes.run(OPS, WAITS, ALL, lambda i, found=found: found.add(torch.get_num_threads()))
        assert found == {number} and torch.get_num_threads() == number


# Streams.


def test_lanes_have_the_callers_context() -> None:
    """Each run anew, and nothing of theirs comes back: torch keeps its compiler's settings there."""
    setting: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="none")
    lanes, seen = CudaLanes(CPU), []

    def execute(i: int) -> None:
        seen.append(setting.get())
        setting.set("of an op")

    for value in ("first", "second"):
        setting.set(value)
        seen.clear()
        for i in (0, len(OPS) - 1):  # each op alone, so that it sees no other's
            lanes.run(OPS, [()] * len(OPS), range(i, i + 1), execute)
        assert seen == [value] * 2 and setting.get() == value


def test_downloads_yield_to_compute() -> None:
    """torch knows 0, the lowest, and negative numbers, which come first."""
    priority = {lane: stream.priority for lane, stream in CudaLanes(CPU).streams.items()}
    assert priority[Lane.COMPUTE] < 0 and priority[Lane.UPLOAD] == priority[Lane.DOWNLOAD] == 0


def test_nothing_waits_for_the_whole_device(fake_cuda: list[str]) -> None:
    lanes = CudaLanes(CPU)
    for _ in range(3):
        idents(lanes)
    assert fake_cuda == []
    with pytest.raises(ZeroDivisionError):
        lanes.run(OPS, WAITS, ALL, lambda i: 1 // 0)
    assert fake_cuda == ["MainThread"]  # an op that failed has recorded no event


def races(lanes: CudaLanes, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The caller writes a slot, one run reads it on the compute stream, and another overwrites it on the
    upload stream: accesses that nothing orders."""
    slot = torch.zeros(4)
    ops = [Op("F", 1, 0, frozenset({Buffer("slot", 0)})), Op("U", 1, writes=frozenset({Buffer("slot", 0)}))]
    real = lanes_module._CudaRun._lane
    with Watch([slot]) as watch, monkeypatch.context() as patch:

        def lane(self: Any, name: Lane, mine: list[int]) -> None:
            with watch.lane():
                real(self, name, mine)

        patch.setattr(lanes_module._CudaRun, "_lane", lane)
        with watch.lane():
            slot.fill_(1.0)
        lanes.run(ops, [(), ()], range(1), lambda i: slot.sum())
        lanes.run(ops, [(), ()], range(1, 2), lambda i: slot.zero_())
    return watch.errors


def test_a_run_comes_after_the_caller_and_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not races(CudaLanes(CPU), monkeypatch)
    with monkeypatch.context() as patch:  # the controls
        patch.setattr(lanes_module._CudaRun, "_wait_for_device", lambda self: None)
        assert len(races(CudaLanes(CPU), monkeypatch)) == 1
    with monkeypatch.context() as patch:
        honest = fake.Stream.wait_event
        patch.setattr(
            fake.Stream, "wait_event", lambda self, event: None if event.is_origin else honest(self, event)
        )
        patch.setattr(fake.Event, "is_origin", property(lambda self: self is origin()), raising=False)
        lanes = CudaLanes(CPU)

        def origin() -> Any:
            return lanes._events["origin", False][0]

        assert races(lanes, monkeypatch)


# What strikes them.


def strike(thread: LaneThread, error: type[BaseException] = Injected) -> None:
    ident = thread._thread.ident
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What ended a thread, instead of a traceback; and no long wait for a dead one."""
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_type))
    monkeypatch.setattr(lanes_module, "_LOOK_SECONDS", 0.05)
    yield died


def test_an_exception_in_an_idle_thread_loses_no_run(quiet: list[Any]) -> None:
    lanes = CudaLanes(CPU)
    before = idents(lanes)
    old = lanes._threads[Lane.COMPUTE]
    strike(old)  # the thread wakes up with the next run's task in hand
    after = idents(lanes)
    assert set(after) == set(before) and quiet == [Injected]
    assert not alive([old]) and lanes._threads[Lane.COMPUTE].is_usable


def test_an_exception_in_an_op_surfaces_with_its_name(quiet: list[Any]) -> None:
    lanes = CudaLanes(CPU)
    before = idents(lanes)
    victim = next(i for i in ALL if OPS[i].kind == "B")

    def execute(i: int) -> None:
        if i == victim:
            strike(lanes._threads[Lane.COMPUTE])
            for _ in range(1000):
                time.sleep(1e-3)

    with pytest.raises(Injected) as caught:
        lanes.run(OPS, WAITS, ALL, execute)
    assert f"in op {OPS[victim]} (compute lane" in caught.value.__notes__[0]
    after = idents(lanes)
    assert {lane for lane in before if before[lane] != after[lane]} <= {Lane.COMPUTE} and not quiet


def test_exceptions_at_any_time(quiet: list[Any], record_property: Callable[[str, object], None]) -> None:
    """Each run does all its ops once or raises, soon, and the next one is whole again."""
    lanes, rng, raised = CudaLanes(CPU), random.Random(5), 0
    idents(lanes)
    stop = threading.Event()

    def torment(lanes: CudaLanes) -> None:
        while not stop.wait(rng.random() * 4e-3):
            thread = rng.choice(threads_of(lanes))
            if thread._has_begun and not thread.is_dead:
                strike(thread)

    tormentor = threading.Thread(target=torment, args=(lanes,))
    tormentor.start()
    try:
        for _ in range(times(150, 5000)):
            done: list[int] = []
            began = time.monotonic()
            try:
                lanes.run(OPS, WAITS, ALL, done.append)
                assert sorted(done) == list(ALL)
            except (Injected, RuntimeError) as error:
                assert isinstance(error, Injected) or "is gone" in str(error)
                assert len(done) == len(set(done))
                raised += 1
            assert time.monotonic() - began < SECONDS
    finally:
        stop.set()
        tormentor.join()
    record_property("raised", raised)
    time.sleep(0.05)
    with suppress(Injected, RuntimeError):
        idents(lanes)  # a blow that was meant for the last run
    idents(lanes)
    threads = threads_of(lanes)
    del lanes
    gc.collect()  # an error refers to the run that raised it
    assert raised and not alive(threads)


def interrupted_runs(lanes: CudaLanes) -> int:
    """Interrupt runs at moments, of which there are this many."""
    moments, rng = Moments(lambda path: path.startswith("engine/lane")), random.Random(7)
    moments.run(lambda: idents(lanes))
    total, repeats = moments.count, times(60, 2000)
    for part in range(repeats):
        working: set[Lane] = set()

        def execute(i: int, working: set[Lane] = working) -> None:
            working.add(OPS[i].lane)
            time.sleep(1e-4)
            working.remove(OPS[i].lane)

        at = int(total * (part + rng.random()) / repeats)
        moments.run(lambda execute=execute: lanes.run(OPS, WAITS, ALL, execute), at)
        assert not working, moments.where
        lanes.join()
        found = idents(lanes)
        assert all(len(threads) == 1 for threads in found.values()), moments.where
    return total


def test_an_interrupt_of_the_caller_at_any_moment(record_property: Callable[[str, object], None]) -> None:
    """No op runs once `run` has raised, the next run is whole, and no thread is forgotten."""
    gc.collect()
    before = set(threading.enumerate())
    lanes = CudaLanes(CPU)
    record_property("moments", interrupted_runs(lanes))
    assert len(set(threading.enumerate()) - before) <= len(lanes._threads)
    del lanes
    gc.collect()
    deadline = time.monotonic() + SECONDS
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_a_dead_thread_is_replaced_by_the_next_run() -> None:
    lanes = CudaLanes(CPU)
    idents(lanes)
    dead = lanes._threads[Lane.DOWNLOAD]
    dead.end()
    assert not alive([dead]) and dead.is_dead and not dead.is_usable
    assert len(idents(lanes)[Lane.DOWNLOAD]) == 1 and lanes._threads[Lane.DOWNLOAD] is not dead


# The process: forks, and its end. Each case in a process of its own.

_BEGIN = """
import atexit, os, signal, sys, threading, time
import pytest, torch
import fake_cuda
patch = pytest.MonkeyPatch()
fake_cuda.replace_cuda(patch)
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.schedule import StepSpec, build, derive_waits
units = frozenset({1, 2, 3})
ops = build(StepSpec(layers=2, uploaded=units, trainable=units, embedding_unit=3, micro_batches=2))
waits, everything = derive_waits(ops), range(len(ops))
lanes = CudaLanes(torch.device("cpu"))
done = []
lanes.run(ops, waits, everything, done.append)
"""


def in_process(code: str) -> str:
    helpers = str(Path(__file__).parents[1] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {helpers!r})\n{_BEGIN}{code}"],
        capture_output=True,
        text=True,
        timeout=60,  # seconds; most of them go into imports
    )
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)
    return done.stdout


def test_a_forked_child_starts_its_own_threads() -> None:
    """Forked while they idle and in the middle of a run, by hand and as a loader's workers; the parent's run
    goes on. Threads that idle end before the process does."""
    code = """
from torch.utils.data import DataLoader

def train():
    done.clear()
    lanes.run(ops, waits, everything, done.append)
    assert sorted(done) == list(everything)
    me = threading.current_thread()
    return len([t for t in threading.enumerate() if t.name.startswith("horizon-") and t is not me])

def fork(leave):
    child = os.fork()
    if not child:
        signal.alarm(30)
        lanes.join()  # as every call of a model begins
        before = len(threading.enumerate())
        leave(0 if before <= 1 and train() and train() == len(lanes._threads) else 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def execute(i):
    if i == len(ops) // 2:
        print(fork(os._exit), list(DataLoader([1, 2], num_workers=1)))

print(fork(sys.exit))
lanes.run(ops, waits, everything, execute)
before = {lane: thread._thread.ident for lane, thread in lanes._threads.items()}
print(train() == len(before) and before == {l: t._thread.ident for l, t in lanes._threads.items()})
atexit._run_exitfuncs()  # handlers run in reverse, so torch's come later
print(len([t for t in threading.enumerate() if t.name.startswith("horizon-")]))
"""
    assert in_process(code).split("\n")[:4] == ["0", "0 [tensor([1]), tensor([2])]", "True", "0"]


def test_a_process_ends_though_a_lane_is_in_an_op() -> None:
    """In silence and soon: as the interpreter ends, so does the thread."""
    code = """
inside = threading.Event()
def execute(i):
    inside.set()
    while True:
        time.sleep(1e-3)
other = threading.Thread(target=lambda: lanes.run(ops, waits, everything, execute), daemon=True)
other.start()
inside.wait()
atexit.register(lambda: print("at exit", flush=True))
"""
    assert in_process(code) == "at exit\n"
