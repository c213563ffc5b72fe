"""An interrupted call leaves the state before a step or the one after it, or says that it is of no step."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from fake_cuda import fake_cuda  # noqa: F401
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.engine.step import Update
from horizon_lm.errors import ConfigError, TornStateError
from horizon_lm.optim import kernel
from horizon_lm.optim.progress import Progress
from horizon_lm.run.resume import load_checkpoint
from horizon_lm.schedule import Op
from moments import Moments
from sizes import SOAK, times
from small_runs import settings, write_text

MODES = ("deferred", "sync", "eager")
SECONDS = 20.0  # within which a thread must come back
Bytes = list[torch.Tensor]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(times(300, 7200))]


def host(update: str, **more: Any) -> hz.HostModel:
    """Two layers; with parts of a unit that are updated by a call of the kernel each."""
    config = zoo.CASES["llama"].config()
    config.num_hidden_layers = 2
    values: dict[str, Any] = {
        "dtype": "bfloat16",
        "update": update,
        "max_grad_norm": None if update == "eager" else 0.5,
        "lr_factors": {"mlp": 0.5},
        "skip_memory_check": True,
    }
    source = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    return hz.HostModel.from_pretrained(source, device="cpu", **{**values, **more})


def batch(seed: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch("llama", batch_size=1, length=4, seed=seed + 1)]


def runs_of(model: hz.HostModel) -> Bytes:
    """Every region that outlives a step."""
    return [run for region, runs in model.store._runs.items() if region[0] != "g" for run in runs]


def bytes_of(model: hz.HostModel) -> Bytes:
    return [run.clone().view(torch.uint8) for run in runs_of(model)]


def same(one: Bytes, two: Bytes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Copies:
    """A checkpoint in memory."""

    def __init__(self, model: hz.HostModel) -> None:
        self.model, self.units = model, {}  # type: ignore[var-annotated]
        self.ended = self.abandoned = False

    def write_unit(self, unit: int) -> None:
        if not self.abandoned:
            runs = self.model.store._runs.items()
            self.units[unit] = [r[unit].clone().view(torch.uint8) for n, r in runs if n[0] != "g"]

    def are(self, state: Bytes) -> bool:
        units = len(self.model.store.units)
        wanted = {unit: state[unit::units] for unit in self.units}
        return len(wanted) == 4 and all(same(value, wanted[unit]) for unit, value in self.units.items())

    def finish(self) -> None:
        self.ended = True

    def abandon(self) -> None:
        self.abandoned = True


class Tried:
    """A model in one update mode, its states after 3 to 5 steps, and a call that leads through them."""

    def __init__(self, update: str) -> None:
        self.model, self.update, self.torn = host(update), update, 0
        for step in range(3):
            self.train(step)
        self.states = [self.state()]
        for step in (3, 4):
            self.train(step)
            self.states.append(self.state())
        self.copies = Copies(self.model)

    def train(self, step: int, **more: Any) -> None:
        self.model.train_step(batch(step), lr=1e-2, weight_decay=0.1, **more)

    def state(self) -> Bytes:
        self.model.flush()
        return bytes_of(self.model)

    def begin(self) -> None:
        for run, value in zip(runs_of(self.model), self.states[0], strict=True):
            run.view(torch.uint8).copy_(value)
        self.model.state_was_replaced(3)
        self.model.finish_saving()
        self.copies = Copies(self.model)

    def call(self) -> None:
        """Two steps, an evaluation between them, a checkpoint beside the second."""
        self.train(3)
        self.model.evaluate(batch(9))
        self.model.save_state(self.copies, background=True)
        self.train(4)
        self.model.flush()

    def look(self) -> None:
        """At what an interrupt left; and train on from it."""
        model, copies = self.model, self.copies
        if model.engine.torn:
            assert self.update == "eager" and model.steps_done in (3, 4)
            with pytest.raises(TornStateError):
                self.train(4)
            self.torn += 1
            return
        now, done = self.state(), model.steps_done
        assert same(now, self.states[done - 3]), done
        model.finish_saving()
        if copies.ended and not copies.abandoned:
            assert copies.are(self.states[1])
        for step in range(done, 5):
            self.train(step)
        assert same(self.state(), self.states[2]), "what the interrupt left behind shows later"


@pytest.fixture(scope="module")
def tried() -> Callable[[str], Tried]:
    made: dict[str, Tried] = {}
    return lambda update: made.setdefault(update, Tried(update))


@pytest.fixture(params=["kernel", "reference"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What updates: the kernel, or the reference in pieces far smaller than a unit."""
    if request.param == "reference":
        monkeypatch.setattr(kernel, "library", lambda: None)
        monkeypatch.setattr(kernel, "_REFERENCE_PIECE", 3000)
    elif kernel.library() is None:
        pytest.skip("the kernel is not built")
    return str(request.param)


def of_the_state(path: str) -> bool:
    """Whether a file keeps account of where the model is."""
    return path.startswith(("optim/", "run/", "engine/engine", "engine/step", "engine/disk", "engine/lanes"))


@pytest.mark.parametrize("update", MODES)
def test_an_interrupt_at_any_moment(
    update: str, by: str, tried: Callable[[str], Tried], record_property: Callable[[str, object], None]
) -> None:
    one = tried(update)
    moments = Moments((lambda path: True) if SOAK else of_the_state)
    one.begin()
    assert not moments.run(one.call)
    total, seed = moments.count, random.randrange(1 << 30) if SOAK else 3
    rng = random.Random(seed)
    repeats = times(5, 150)
    for part in range(repeats):  # from the whole of it, evenly
        one.begin()
        at = int(total * (part + rng.random()) / repeats)
        if moments.run(one.call, at):
            try:
                one.look()
            except AssertionError as error:
                error.add_note(f"interrupted at moment {at} of {total}: {moments.where}; seed {seed}")
                raise
    record_property("moments", total)


@pytest.mark.parametrize("update", MODES)
def test_a_signal_at_any_time(
    update: str, tried: Callable[[str], Tried], record_property: Callable[[str, object], None]
) -> None:
    """As people send them; the handler is Python's own, on a signal that a clock of the processor sends."""
    one, interrupts = tried(update), 0
    before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    rng = random.Random()
    try:
        one.begin()
        began = time.process_time()
        one.call()
        seconds = time.process_time() - began
        for _ in range(times(5, 150)):
            one.begin()
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, rng.uniform(1e-5, seconds))
                try:
                    one.call()
                finally:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
                one.look()
    finally:
        signal.signal(signal.SIGVTALRM, before)
    record_property("interrupts", interrupts)
    assert interrupts > times(1, 75)


class Pending:
    """The deferred updates of one step, to be made again and again."""

    def __init__(self) -> None:
        self.model = model = host("deferred")
        model.train_step(batch(0), lr=1e-2, weight_decay=0.1)
        self.update, self.before = model.engine._update, bytes_of(model)
        model.flush()
        self.after = bytes_of(model)
        assert not same(self.before, self.after)

    def begin(self) -> None:
        for run, value in zip(runs_of(self.model), self.before, strict=True):
            run.view(torch.uint8).copy_(value)
        update = self.update
        assert update is not None
        self.model.engine._update = Update.of(update.progress, update.settings)
        self.model.engine._update.grad_scale = update.grad_scale


def test_an_update_is_made_once_wherever_it_is_cut(
    by: str, record_property: Callable[[str, object], None]
) -> None:
    """Moments of the updates of all units, in `make soak` every one, and the rest of them twice over."""
    pending = Pending()
    moments = Moments(lambda path: path.startswith(("optim/", "engine/ops")))
    pending.begin()
    moments.run(pending.model.flush)
    total = moments.count
    assert total > 100 and same(bytes_of(pending.model), pending.after)
    tried_at = range(0, total, times(max(1, total // 40), 1))
    for at in tried_at:
        pending.begin()
        assert moments.run(pending.model.flush, at)
        moments.run(pending.model.flush, at // 3)  # and once more, sooner
        pending.model.flush()
        assert same(bytes_of(pending.model), pending.after), moments.where
    record_property("moments", len(tried_at))


def test_an_update_that_is_noted_later_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: as it was."""
    if kernel.library() is None:
        pytest.skip("the kernel is not built")
    pending, calls = Pending(), []

    def call(self: Progress, function: Callable[..., int], argument: object) -> int:
        status = function(argument)
        calls.append(status)
        if len(calls) == 2:
            raise KeyboardInterrupt
        self.ended.append(status)
        return status

    monkeypatch.setattr(Progress, "call", call)
    pending.begin()
    with pytest.raises(KeyboardInterrupt):
        pending.model.flush()
    pending.model.flush()
    assert not same(bytes_of(pending.model), pending.after)


# What is of no step.


@pytest.fixture
def torn(tried: Callable[[str], Tried], monkeypatch: pytest.MonkeyPatch) -> Iterator[hz.HostModel]:
    """A layer raised in the backward pass, after the layers above it were updated."""
    one = tried("eager")
    one.begin()
    honest = one.model.engine._run["B"]

    def fail(step: Any, op: Op) -> None:
        if op.unit == 1:
            raise OverflowError("in a layer")
        honest(step, op)

    with monkeypatch.context() as patch:
        patch.setitem(one.model.engine._run, "B", fail)
        with pytest.raises(OverflowError) as caught:
            one.train(3)
    assert "2 of 4 units were updated already (update: eager) when step 4 was cut short" in " ".join(
        caught.value.__notes__
    )
    yield one.model
    one.begin()


def test_a_state_of_no_step_is_not_gone_on_from_nor_saved(torn: hz.HostModel, tmp_path: Path) -> None:
    before = bytes_of(torn)
    calls: dict[str, Callable[[], object]] = {
        "train_step": lambda: torn.train_step(batch(4), lr=1e-3),
        "save_pretrained": lambda: torn.save_pretrained(tmp_path / "model"),
        "save_state": lambda: torn.save_state(Copies(torn)),
    }
    for name, call in calls.items():
        with pytest.raises(TornStateError, match=f"{name}.*of no step: 2 of 4 units were updated") as caught:
            call()
        assert "force=True" in (caught.value.hint or "") and caught.value.exit_code == 5
    assert torn.steps_done == 3 and same(bytes_of(torn), before) and not (tmp_path / "model").exists()


def test_a_state_of_no_step_can_be_looked_at(torn: hz.HostModel, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert torn.evaluate(batch(4)).loss > 0
        assert dict(torn.named_parameters())
    assert caplog.text.count("the weights are those of no step: 2 of 4 units were updated") == 1


def test_a_state_of_no_step_is_taken_by_force(torn: hz.HostModel, tmp_path: Path) -> None:
    torn.save_pretrained(tmp_path / "model", force=True)
    assert (tmp_path / "model" / "model.safetensors").exists()
    copies = Copies(torn)
    torn.save_state(copies, force=True)
    assert copies.ended and torn.engine.torn
    torn.train_step(batch(4), lr=1e-3, force=True)
    assert torn.steps_done == 4 and not torn.engine.torn
    torn.train_step(batch(5), lr=1e-3)


def test_a_state_that_is_read_anew_is_one_to_go_on_from(
    torn: hz.HostModel, tried: Callable[[str], Tried]
) -> None:
    one = tried("eager")
    one.begin()
    assert not torn.engine.torn
    one.train(3)
    assert same(one.state(), one.states[1])


@pytest.mark.parametrize("values", [{"weight_decay": 1e39}, {"lr": 1e39}, {"weight_decay": torch.ones(2)}])
def test_numbers_are_refused_before_an_eager_update(
    values: dict[str, Any], tried: Callable[[str], Tried]
) -> None:
    one = tried("eager")
    one.begin()
    with pytest.raises(ConfigError):
        one.model.train_step(batch(3), **{"lr": 1e-3, **values})
    assert same(bytes_of(one.model), one.states[0]) and not one.model.engine.torn
    one.look()


def test_reading_a_checkpoint_that_is_cut_short(tmp_path: Path, no_samples: None) -> None:
    text = write_text(tmp_path / "text.txt")
    hz.train(settings(text, tmp_path / "run", max_steps=1, save_steps=1))
    checkpoint = list_checkpoints(tmp_path / "run")[0][0]
    model = hz.HostModel.from_pretrained(tmp_path / "run" / "model", device="cpu", dtype="float32")
    moments = Moments(lambda path: path.startswith("checkpoint/units"))
    assert moments.run(lambda: load_checkpoint(checkpoint, model), 20)
    with pytest.raises(TornStateError, match="reading a saved state was cut short"):
        model.save_pretrained(tmp_path / "model")
    load_checkpoint(checkpoint, model)
    assert model.steps_done == 1
    model.save_pretrained(tmp_path / "model")


# Threads.


def in_thread(call: Callable[[], object]) -> Callable[[], list[BaseException]]:
    """Start it; the answer waits for its end, and returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> list[BaseException]:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"
        return raised

    return wait


def trained_beside(one: Tried, turns: int) -> bool:
    """Whether steps have their own bits while another thread evaluates, reads and saves."""
    one.begin()
    stop, seen = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            copies = Copies(one.model)
            seen.append(one.model.evaluate(batch(9)).loss)
            one.model.save_state(copies)
            assert any(copies.are(state) for state in one.states)

    wait = in_thread(look)
    try:
        for _ in range(turns):
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
    fake_cuda: list[str],  # noqa: F811
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
    fake_cuda: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two interrupts: the second ends the wait for the lanes, one of which is in the middle of an update."""
    model, twin = host("sync", lanes="adversarial"), host("sync")
    model.engine.lanes = CudaLanes(torch.device("cpu"))
    twin.train_step(batch(0), lr=1e-2)
    inside, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    honest = model.engine._run["O"]

    def slow(step: Any, op: Op) -> None:
        if op.unit != 1:
            honest(step, op)
            return
        inside.set()
        go_on.wait(SECONDS)
        honest(step, op)
        ended.set()

    monkeypatch.setitem(model.engine._run, "O", slow)

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
