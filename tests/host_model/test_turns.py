"""Threads: calls of one model take turns, and an interrupt leaves none of the engine's own at work unseen."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.errors import ConfigError
from horizon_lm.schedule import Op
from known_states import MODES, SECONDS, Copies, Tried, batch, bytes_of, host, in_thread, same
from sizes import times

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tried() -> Callable[[str], Tried]:
    made: dict[str, Tried] = {}
    return lambda update: made.setdefault(update, Tried(update))


def trained_beside(one: Tried, turns: int) -> bool:
    """Whether steps have their own bits while another thread evaluates, reads and saves."""
    one.begin()
    stop, looked, seen = threading.Event(), threading.Event(), []

    def look() -> None:
        try:
            while not stop.is_set():
                copies = Copies(one.model)
                seen.append(one.model.evaluate(batch(9)).loss)
                one.model.save_state(copies)
                assert any(copies.are(state) for state in one.states)
                looked.set()
        finally:
            looked.set()

    wait = in_thread(look)
    began = time.monotonic()
    try:
        for turn in count():
            if turn >= turns and (looked.is_set() or time.monotonic() - began > SECONDS):
                break
            one.begin()
            for step in (3, 4):
                one.train(step)
            if not same(one.state(), one.states[2]):
                return False
    finally:
        stop.set()
        raised = wait()
    return bool(seen) and not raised


@pytest.mark.parametrize("update", MODES)
def test_calls_of_several_threads_take_turns(update: str, tried: Callable[[str], Tried]) -> None:
    assert trained_beside(tried(update), times(3, 20))


def test_without_turns_threads_disturb_each_other(
    tried: Callable[[str], Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a lock that locks nothing."""

    class Nothing:
        def __enter__(self) -> None: ...
        def __exit__(self, *exc: object) -> None: ...

    one = tried("deferred")
    with monkeypatch.context() as patch:
        patch.setattr(one.model, "_turn", Nothing())
        try:
            held = trained_beside(one, 10)
        except Exception:
            held = False
    assert not held
    one.model = host("deferred")  # whatever they have left


@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
@pytest.mark.parametrize("call", ["evaluate", "train_step", "named_parameters", "save_pretrained"])
def test_a_call_from_within_a_step_is_refused(
    call: str,
    lanes: str,
    tmp_path: Path,
    fake_cuda: list[str],
) -> None:
    """A lane's thread would wait for the thread that waits for it."""
    model = host("deferred", lanes="inline" if lanes == "inline" else "adversarial")
    if lanes == "cuda":
        model.engine.lanes = CudaLanes(torch.device("cpu"))
    calls: dict[str, Callable[[], object]] = {
        "evaluate": lambda: model.evaluate(batch(1)),
        "train_step": lambda: model.train_step(batch(1), lr=1e-3),
        "named_parameters": lambda: dict(model.named_parameters()),
        "save_pretrained": lambda: model.save_pretrained(tmp_path / "model"),
    }

    def loss_fn(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        calls[call]()
        return -log_probs.sum()

    with pytest.raises(ConfigError, match=r"in the middle of a step of the same model \(in op L3.0\)"):
        model.train_step(batch(0), lr=1e-3, loss_fn=loss_fn)
    assert model.train_step(batch(0), lr=1e-3).loss > 0


def test_another_model_may_be_called_from_within_a_step() -> None:
    """As a reference model is."""
    model, other = host("deferred"), host("deferred")
    wanted = other.evaluate(batch(0), return_log_probs=True).log_probs
    assert wanted is not None

    def loss_fn(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        found = other.evaluate([given], return_log_probs=True).log_probs
        assert found is not None and torch.equal(found[0], wanted[0])
        return -log_probs.sum()

    model.train_step(batch(0), lr=1e-3, loss_fn=loss_fn)


def test_check_may_look_at_the_model_but_not_train_it(tried: Callable[[str], Tried]) -> None:
    one = tried("deferred")
    one.begin()
    one.train(3, check=lambda loss, n: one.model.evaluate(batch(9)) and None)
    assert same(one.state(), one.states[1])
    with pytest.raises(ConfigError, match="check trained the model"):
        one.train(4, check=lambda loss, n: one.train(4))
    assert same(one.state(), one.states[2]) and one.model.steps_done == 5


def test_parameters_are_of_one_step(tried: Callable[[str], Tried]) -> None:
    one = tried("deferred")
    one.begin()
    names = one.model.named_parameters()
    next(names)
    one.model.evaluate(batch(9))
    next(names)
    one.train(3)
    with pytest.raises(
        ConfigError, match="trained while named_parameters.. was read: step 3 at first, 4 now"
    ):
        next(names)


def test_a_thread_that_waits_finds_a_model_that_was_closed() -> None:
    model = host("deferred")
    inside, go_on = threading.Event(), threading.Event()

    def loss_fn(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        inside.set()
        go_on.wait(SECONDS)
        return -log_probs.sum()

    training = in_thread(lambda: model.train_step(batch(0), lr=1e-3, loss_fn=loss_fn))
    assert inside.wait(SECONDS)
    closing = in_thread(model.close)
    time.sleep(0.05)
    go_on.set()
    assert not training() and not closing() and model.steps_done == 1
    with pytest.raises(ConfigError, match="closed"):
        model.evaluate(batch(0))


# Threads of the engine's own.


def test_lanes_that_an_interrupt_left_at_work_are_waited_for(
    fake_cuda: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two interrupts: the second ends the wait for the lanes, one of which is in the middle of an update."""
    model, twin = host("sync", lanes="adversarial"), host("sync")
    model.engine.lanes = CudaLanes(torch.device("cpu"))
    twin.train_step(batch(0), lr=1e-2)
    inside, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    honest = model.engine.ops.functions["O"]

    def slow(step: Any, op: Op) -> None:
        if op.unit != 1:
            honest(step, op)
            return
        inside.set()
        go_on.wait(SECONDS)
        honest(step, op)
        ended.set()

    monkeypatch.setitem(model.engine.ops.functions, "O", slow)

    taken = threading.Semaphore(0)

    def handler(number: int, frame: object) -> None:
        taken.release()
        raise KeyboardInterrupt

    def interrupt() -> None:
        inside.wait(SECONDS)
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGVTALRM)
            taken.acquire(timeout=SECONDS)
            time.sleep(0.1)

    before = signal.signal(signal.SIGVTALRM, handler)
    try:
        wait = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.train_step(batch(0), lr=1e-2)
        wait()
    finally:
        signal.signal(signal.SIGVTALRM, before)
    assert not ended.is_set(), "the second interrupt was not waited with"
    threading.Timer(0.2, go_on.set).start()
    model.flush()
    assert ended.is_set()
    assert same(bytes_of(model), bytes_of(twin)) and model.steps_done == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_disk_lane_whose_thread_was_kept_from_starting(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, done = DiskLane(patience_seconds=SECONDS), []
    honest = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if moment == "after":
            honest(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            lane.submit(frozenset(), lambda: done.append(1))
    lane.submit(frozenset(), lambda: done.append(2))
    began = time.monotonic()
    lane.drain()
    assert done == [1, 2] and lane.is_idle and time.monotonic() - began < SECONDS / 2
