"""A call that fails leaves the state of the last finished step: it can be evaluated, saved and trained on."""

from __future__ import annotations

import decimal
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import horizon_lm as hz
from bad_calls import Call, batch, digest, host, train
from horizon_lm.engine import policies
from horizon_lm.errors import ConfigError, DataError, HorizonError, NonFiniteError
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.optim.rules import finite_number

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("sync", "deferred", "eager")

# ---- what is wrong with a call --------------------------------------------------------------

NUMBERS: dict[str, tuple[Any, str]] = {
    "text": ("1e-3", "is text, not a number"),
    "bytes": (b"1e-3", "is text, not a number"),
    "a boolean": (True, "is a boolean"),
    "numpy's boolean": (np.True_, "is a boolean"),
    "negative": (-1, "is negative"),
    "NaN": (math.nan, "is not finite"),
    "infinite": (math.inf, "is not finite"),
    "huge": (10**400, "is not finite"),
    "complex": (1j, "is not a number"),
    "decimal": (decimal.Decimal("0.1"), "is not a number"),
    "a list": ([1e-3], "is not a number"),
    "two numbers": (torch.tensor([1e-3, 1e-3]), "is not one number"),
    "no number": (np.array([]), "is not one number"),
    "a tensor of NaN": (torch.tensor(math.nan), "is not finite"),
    "a tensor without content": (torch.empty((), device="meta"), "without values"),
}
NAMES = ("lr", "weight_decay", "max_grad_norm")
TOO_LARGE = {"lr": 1e39, "weight_decay": 1e39}  # for float32


def bad_number(name: str, value: Any, *, in_two: bool) -> Call:
    def call(model: hz.HostModel) -> None:
        given = {"lr": 1e-3, name: value}
        if in_two and model.settings.update_mode != "eager":
            model.forward_backward(batch(1))
            model.step(**given)
        else:
            model.train_step(batch(1), **given)

    return call


def raises_in_loss(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    raise OverflowError("in the loss function")


BAD_CALLS: dict[str, tuple[type[BaseException], Call]] = {
    **{
        f"{name} is {what}": (ConfigError, bad_number(name, value, in_two=bool(i % 2)))
        for i, (name, (what, (value, _))) in enumerate(itertools.product(NAMES, NUMBERS.items()))
        if (name, what) != ("max_grad_norm", "infinite")  # which clips nothing, as in PyTorch
    },
    **{
        f"{name} overflows": (ConfigError, bad_number(name, v, in_two=False)) for name, v in TOO_LARGE.items()
    },
    "lr is None": (ConfigError, bad_number("lr", None, in_two=False)),
    "labels are floats": (
        DataError,
        lambda m: m.train_step([b | {"labels": b["labels"].float()} for b in batch(1)], lr=1e-3),
    ),
    "a bad second micro-batch": (DataError, lambda m: m.train_step([*batch(1), {"input_ids": 3}], lr=1e-3)),
    "no micro-batch": (DataError, lambda m: m.train_step([], lr=1e-3)),
    "loss_fn is text": (ConfigError, lambda m: m.train_step(batch(1), lr=1e-3, loss_fn="mse")),  # type: ignore[arg-type]
    "loss_fn raises": (OverflowError, lambda m: m.train_step(batch(1), lr=1e-3, loss_fn=raises_in_loss)),
    "loss_fn returns text": (ConfigError, lambda m: m.train_step(batch(1), lr=1e-3, loss_fn=lambda p, b: "")),
    "a metric is text": (
        ConfigError,
        lambda m: m.train_step(batch(1), lr=1e-3, loss_fn=lambda p, b: (p.sum(), {"note": "text"})),
    ),
    "a loss of NaN": (
        NonFiniteError,
        lambda m: m.train_step(batch(1), lr=1e-3, loss_fn=lambda p, b: p.sum() * math.nan),
    ),
    "evaluate gets no labels": (DataError, lambda m: m.evaluate([{"input_ids": batch()[0]["input_ids"]}])),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", MODES)
def test_a_bad_call_leaves_no_trace(update: str, dtype: str) -> None:
    """Every bad call is followed by a good step: the bits are those of a model that saw no bad call."""
    model, twin = host(update, dtype), host(update, dtype)
    seen = set()
    for step, (name, (kind, call)) in enumerate(BAD_CALLS.items()):
        if step % 8 == 0:  # often enough for both to be trained on in between
            train(model, step)
            train(twin, step)
        with pytest.raises(kind) as caught:
            call(model)
        if isinstance(caught.value, HorizonError):
            assert caught.value.hint, name
        assert not seen or model.steps_done == twin.steps_done, name
        if step % 3 == 0:
            model.flush()
            twin.flush()
            assert digest(model) == digest(twin), name
        seen.add(digest(model))
    train(model, 99)
    train(twin, 99)
    model.flush()
    twin.flush()
    assert digest(model) == digest(twin) and len(seen) > 5


@pytest.mark.parametrize("what", NUMBERS)
def test_the_error_names_the_call_the_number_and_the_way_out(what: str) -> None:
    value, problem = NUMBERS[what]
    with pytest.raises(ConfigError, match=problem) as caught:
        finite_number("step()", "lr", value, hint="lr=1e-5")
    assert caught.value.message.startswith("step(): lr=") and "lr=" in (caught.value.hint or "")
    if what == "text":
        assert caught.value.hint == "lr=0.001, without quotes"


@pytest.mark.parametrize(
    "value", [1, 0, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5), torch.tensor([1])]
)
def test_numbers_of_all_kinds(value: Any) -> None:
    found = finite_number("step()", "lr", value, hint="")
    assert type(found) is float and found == float(value)


def test_a_tensor_for_a_number_gives_the_same_bits() -> None:
    one, two = host(), host()
    for number, model in ((lambda x: x, one), (torch.tensor, two)):
        model.train_step(batch(), lr=number(0.5), weight_decay=number(0.25), max_grad_norm=number(0.125))
        model.flush()
    assert digest(one) == digest(two)


def test_an_infinite_limit_clips_nothing() -> None:
    one, two, clipped = host(), host(), host()
    for limit, model in ((math.inf, one), (None, two), (1e-3, clipped)):
        model.train_step(batch(), lr=0.5, max_grad_norm=limit)
        model.flush()
    assert digest(one) == digest(two) != digest(clipped)


def test_without_the_check_the_model_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: as it was."""
    monkeypatch.setattr(policies, "finite_number", lambda where, name, value, *, hint: value)
    monkeypatch.setattr(Optimizer, "check", lambda self, settings: None)
    model = host()
    model.train_step(batch(), lr="1e-3")  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(TypeError):
            model.evaluate(batch())


# ---- everything that reads the state, after an error ----------------------------------------


class Copies:
    """A checkpoint in memory: the bytes of each unit as they were when it was written."""

    def __init__(self, model: hz.HostModel) -> None:
        self.store, self.units, self.ended = model.store, {}, False

    def write_unit(self, unit: int) -> None:
        self.units[unit] = {r: runs[unit].clone() for r, runs in self.store._runs.items() if r[0] != "g"}

    def finish(self) -> None:
        self.ended = True

    def abandon(self) -> None:
        raise AssertionError("nothing was wrong with this checkpoint")


def same_copies(one: Copies, two: Copies) -> bool:
    assert one.ended and two.ended and one.units.keys() == two.units.keys() and len(one.units) > 3
    return all(
        torch.equal(value.view(torch.uint8), two.units[unit][region].view(torch.uint8))
        for unit, regions in one.units.items()
        for region, value in regions.items()
    )


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("name", ["lr is text", "loss_fn raises", "a loss of NaN", "labels are floats"])
def test_what_reads_the_state_works_after_an_error(name: str, update: str, tmp_path: Path) -> None:
    """The first look after the error makes the update that is still to come, once."""
    twin = host(update)
    train(twin, 0)
    expected = dict(twin.named_parameters())
    wanted = Copies(twin)
    twin.save_state(wanted)
    kind, call = BAD_CALLS[name]

    def failed() -> hz.HostModel:
        model = host(update)
        train(model, 0)
        with pytest.raises(kind):
            call(model)
        return model

    assert failed().evaluate(batch(5)) == twin.evaluate(batch(5))
    found = dict(failed().named_parameters())
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    model = failed()
    copies = Copies(model)
    model.save_state(copies)
    assert same_copies(copies, wanted) and digest(model) == digest(twin)
    model = failed()
    for one, folder in ((model, "model"), (twin, "twin")):
        one.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "twin")]
    assert files[0] == files[1]


@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
@pytest.mark.parametrize("update", ["sync", "deferred"])
@pytest.mark.parametrize("kind", "UFLBDN")
def test_an_op_that_fails_leaves_no_trace(
    kind: str, update: str, lanes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the last op of each kind, on whichever lane."""
    model, twin = host(update, lanes=lanes), host(update)
    train(model, 0)
    train(twin, 0)
    run_out_in_the_last(model, kind, monkeypatch, lambda: train(model, 1))
    assert model.engine._step is None or kind == "N", "what the failed step held is given back"
    train(model, 2)
    train(twin, 2)
    model.flush()
    twin.flush()
    assert digest(model) == digest(twin)


def run_out_in_the_last(
    model: hz.HostModel, kind: str, monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]
) -> None:
    honest = model.engine.ops.functions[kind]
    count = 0

    def counted(step: Any, op: Any) -> None:
        nonlocal count
        count += 1
        left = sum(other.kind == kind for other in step.schedule.ops) - count
        if left == 0:
            raise torch.OutOfMemoryError("no room")
        honest(step, op)

    with monkeypatch.context() as patch:
        patch.setitem(model.engine.ops.functions, kind, counted)
        with pytest.raises(torch.OutOfMemoryError):
            call()
    assert count


@pytest.mark.parametrize("in_two", [False, True])
def test_an_update_that_has_begun_is_completed(in_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """update: sync: the last of five units' updates fails; the step counts, and the next call ends it."""
    model, twin = host("sync"), host("sync")
    for one in (model, twin):
        train(one, 0)
    if in_two:
        model.forward_backward(batch(1))
        run_out_in_the_last(model, "O", monkeypatch, lambda: model.step(lr=3e-3, weight_decay=0.01) and None)
    else:
        run_out_in_the_last(model, "O", monkeypatch, lambda: train(model, 1))
    assert model.steps_done == 2
    with pytest.raises(ConfigError, match="without gradients"):
        model.step(lr=1e-3)  # which would make some of the updates twice
    train(twin, 1)
    before = digest(model)
    model.flush()
    assert before != digest(model) == digest(twin)


def test_eager_updates_say_that_they_were_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have done cannot be undone: the error says so, and how to avoid it."""
    model = host("eager")
    with pytest.raises(torch.OutOfMemoryError) as caught, monkeypatch.context() as patch:
        honest = model.engine.ops.functions["B"]

        def fail(step: Any, op: Any) -> None:
            if op.unit == 2:
                raise torch.OutOfMemoryError("no room")
            honest(step, op)

        patch.setitem(model.engine.ops.functions, "B", fail)
        train(model, 0)
    notes = " ".join(getattr(caught.value, "__notes__", ()))
    assert "units were updated already (update: eager)" in notes and "update: deferred" in notes
    with pytest.raises(OverflowError) as early:  # from weights of no step only where that is asked for
        model.train_step(batch(), lr=1e-3, loss_fn=raises_in_loss, force=True)
    assert "updated already" not in " ".join(getattr(early.value, "__notes__", ()))


def test_a_checkpoint_of_a_step_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins with the next step is abandoned with it; a new one can be asked for."""

    class Abandoned(Copies):
        was_abandoned = False

        def abandon(self) -> None:
            self.was_abandoned = True

    model, twin = host(), host()
    for one in (model, twin):
        train(one, 0)
    lost = Abandoned(model)
    model.save_state(lost, background=True)
    run_out_in_the_last(model, "B", monkeypatch, lambda: train(model, 1))
    model.finish_saving()
    assert lost.was_abandoned and lost.ended
    copies, wanted = Copies(model), Copies(twin)
    model.save_state(copies)
    twin.save_state(wanted)
    assert same_copies(copies, wanted)
