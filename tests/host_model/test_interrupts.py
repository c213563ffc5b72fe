"""An interrupted call leaves the state before a step or the one after it, or says that it is of no step."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import horizon_lm as hz
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.engine.step import Update
from horizon_lm.errors import ConfigError, TornStateError
from horizon_lm.model.attention import attend
from horizon_lm.optim import kernel
from horizon_lm.optim.progress import Progress
from horizon_lm.schedule import Op
from horizon_lm.training.resume import load_checkpoint
from known_states import MODES, PLACED, Copies, Tried, batch, bytes_of, host, runs_of, same
from moments import Moments
from sizes import SOAK, times
from small_runs import settings, write_text

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(times(300, 7200))]


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
    parts = ("engine/engine", "engine/step", "engine/disk", "engine/lanes")
    return path.startswith(("optim/", "host_model", "training/", *parts))


@pytest.mark.parametrize("update", [*MODES, *PLACED])
def test_an_interrupt_at_any_moment(
    update: str, by: str, tried: Callable[[str], Tried], record_property: Callable[[str, object], None]
) -> None:
    one = tried(update)
    moments = Moments((lambda path: True) if SOAK else of_the_state)
    one.begin()
    assert not moments.run(one.call)
    total, seed = moments.count, random.randrange(1 << 30) if SOAK else 3
    rng = random.Random(seed)
    repeats = times(5 if by == "kernel" else 3, 150)
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


@pytest.mark.parametrize("update", [*MODES, *PLACED])
def test_a_signal_at_any_time(
    update: str, tried: Callable[[str], Tried], record_property: Callable[[str, object], None]
) -> None:
    """As people send them; the handler is Python's own, on a signal that a clock of the processor sends."""
    one, interrupts = tried(update), 0
    before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    rng = random.Random()
    try:
        for _ in range(2):  # the first call takes longer
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
    moments = Moments(lambda path: path.startswith(("optim/", "engine/ops", "engine/updates")))
    pending.begin()
    moments.run(pending.model.flush)
    total = moments.count
    assert total > 100 and same(bytes_of(pending.model), pending.after)
    tried_at = range(0, total, times(max(1, total // 25), 1))
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


def left_behind(model: hz.HostModel) -> list[str]:
    """What a call that was cut short has not put back."""
    modules = dict(model.skeleton.model.named_modules())
    found = [path for path, module in modules.items() if "forward" in module.__dict__]
    for path, module in modules.items():
        bound = [name for name, p in module._parameters.items() if p is not None and p.device.type != "meta"]
        found += [f"{path}.{name}" for name in bound]
    return found + ["attention"] * (AttentionInterface()["sdpa"] is attend)


def test_an_interrupt_leaves_the_modules_as_they_were(tried: Callable[[str], Tried]) -> None:
    """Control: without what restores them, weights stay bound and forwards replaced."""
    one = tried("sync")
    moments = Moments(lambda path: path.startswith(("model/skeleton", "model/anatomy", "model/attention")))
    restore, left = one.model.engine._restorers, 0
    for restores in (restore, ()):
        one.model.engine._restorers = restores
        one.begin()
        moments.run(one.call)
        total = moments.count
        for at in range(0, total, times(max(1, total // 30), 1)):
            one.begin()
            moments.run(one.call, at)
            one.model.flush()  # any call
            if restores:
                assert not left_behind(one.model), moments.where
            else:
                left += bool(left_behind(one.model))
                for function in restore:
                    function()
    one.model.engine._restorers = restore
    assert left > 0


# What is of no step.


@pytest.fixture
def torn(tried: Callable[[str], Tried], monkeypatch: pytest.MonkeyPatch) -> Iterator[hz.HostModel]:
    """A layer raised in the backward pass, after the layers above it were updated."""
    one = tried("eager")
    one.begin()
    honest = one.model.engine.ops.functions["B"]

    def fail(step: Any, op: Op) -> None:
        if op.unit == 1:
            raise OverflowError("in a layer")
        honest(step, op)

    with monkeypatch.context() as patch:
        patch.setitem(one.model.engine.ops.functions, "B", fail)
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
