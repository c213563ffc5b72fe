"""Callbacks: what they are called with, how they end a run, and what becomes of it when one fails."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

import horizon_lm as hz
from exported_weights import exported, weights
from horizon_lm import cli
from horizon_lm.errors import CallbackError, ConfigError
from horizon_lm.training.train import train
from small_runs import losses_of, settings, tensors_of, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    lines = write_text(place / "text.txt").read_text().splitlines()
    (place / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return place / "rows.jsonl"


HELD_OUT = {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps without callbacks, with a checkpoint of each step."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(settings(text, run, **HELD_OUT))
    return run


class All:
    """Notes every call, and asks for the end of the run at one of them."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.stop_at = stop_at

    def _note(self, event: str, state: Any, control: Any) -> None:
        self.calls.append((event, state))
        control.should_training_stop = (event, state.step) == self.stop_at

    def on_step_end(self, state: Any, control: Any) -> None:
        self._note("step", state, control)

    def on_log(self, state: Any, control: Any) -> None:
        self._note("log", state, control)

    def on_evaluate(self, state: Any, control: Any) -> None:
        self._note("evaluate", state, control)

    def on_save(self, state: Any, control: Any) -> None:
        self._note("save", state, control)

    def of(self, event: str) -> list[Any]:
        return [state for name, state in self.calls if name == event]


class OnlySteps:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, state: Any, control: Any) -> None:
        self.steps.append(state.step)


def test_what_callbacks_see_and_that_they_change_nothing(text: Path, straight: Path, tmp_path: Path) -> None:
    run, watch, other = tmp_path / "run", All(), OnlySteps()
    config = settings(text, run, **HELD_OUT, logging_steps=4, save_steps=3, eval_on_start=True)
    hz.train(config, callbacks=[watch, other])
    assert [state.step for state in watch.of("step")] == other.steps == list(range(1, 9))
    assert [state.metrics["step"] for state in watch.of("log")] == [1, 4, 8]
    assert [state.evaluation["step"] for state in watch.of("evaluate")] == [0, 2, 4, 6, 8]
    assert [state.checkpoint.name for state in watch.of("save")] == [f"checkpoint-{n}" for n in (3, 6, 8)]
    assert all(state.checkpoint.is_dir() and state.num_steps == 8 for state in watch.of("save"))
    losses = dict(losses_of(run))
    assert all(state.metrics["loss"] == losses[state.metrics["step"]] for state in watch.of("log"))
    assert 0 < watch.of("step")[3].epoch < 1
    # Nobody is disturbed: the same bits as without callbacks.
    assert tensors_of(run / "checkpoint-6") == tensors_of(straight / "checkpoint-6")
    state = watch.of("step")[-1]
    for change in (
        lambda: setattr(state, "step", 3),
        lambda: state.metrics.update(loss=0.0),
        lambda: state.metrics["lanes"].clear(),
        lambda: state.evaluation.pop("eval_loss"),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()


@pytest.mark.parametrize(
    ("at", "step", "evaluated"),
    [(("step", 5), 5, [2, 4, 5]), (("evaluate", 4), 4, [2, 4]), (("save", 3), 3, [2, 3])],
)
def test_a_callback_ends_the_run_as_a_finished_one(
    at: tuple[str, int],
    step: int,
    evaluated: list[int],
    text: Path,
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, watch = tmp_path / "run", All(at)
    more = {"logging_steps": 4, "save_steps": 3, "save_in_background": False}
    result = hz.train(settings(text, run, **HELD_OUT, **more), callbacks=[watch])
    who = f"the callback All.on_{at[0].replace('step', 'step_end')}"
    ends = step if at[0] != "save" else 4  # what is saved after a step's evaluation ends the next one
    assert result.stopped_by == who and result.num_steps == ends
    assert f"stopped at step {ends} of 8 by {who}" in capsys.readouterr().out
    assert [s.evaluation["step"] for s in watch.of("evaluate")] == (evaluated if ends == step else [2, 4])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == sorted({1, 4, ends})
    assert lines[-1]["event"] == "end" and lines[-1]["status"] == "finished"
    # The model is that of the step it ended at.
    model = tmp_path / "model"
    assert cli.main(["export", str(straight / f"checkpoint-{ends}"), str(model)]) == 0
    assert exported(run) == weights(model) != exported(straight)


class Fails:
    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._fail)

    def _fail(self, state: Any, control: Any) -> None:
        if state.step == self.step:
            raise ZeroDivisionError("of mine")


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 4), ("on_evaluate", 4), ("on_log", 5)])
def test_an_exception_ends_the_run_with_the_state_safe(
    event: str, step: int, text: Path, straight: Path, tmp_path: Path
) -> None:
    run, later = tmp_path / "run", OnlySteps()
    config = settings(text, run, **HELD_OUT, save_steps=100)
    with pytest.raises(
        CallbackError, match=f"Fails.{event} failed after step {step}: ZeroDivisionError"
    ) as caught:
        hz.train(config, callbacks=[Fails(event, step), later])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert f"saved {run / f'checkpoint-{step}'}" in caught.value.message
    # Nobody is called any more, though the step was still finished.
    assert not (run / "model").exists() and later.steps == list(range(1, step + (event == "on_evaluate")))
    # The step was finished: its evaluation too, and going on gives the bits of an undisturbed run.
    hz.train(config.replace(resume_from_checkpoint="latest", save_steps=8))
    assert tensors_of(run / "checkpoint-8") == tensors_of(straight / "checkpoint-8")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [2, 4, 6, 8]


class Mistyped:
    def on_step_ends(self, state: Any, control: Any) -> None: ...


class OtherArguments:
    def on_log(self, args: Any, state: Any, control: Any) -> None: ...


REFUSED: list[tuple[Any, str, str]] = [
    (OnlySteps(), "callbacks is a OnlySteps, expected a list", "callbacks="),
    ([OnlySteps], "is a class, expected an object", "OnlySteps()"),
    ([object()], "no method of a callback", "on_step_end, on_log"),
    ([Mistyped()], "on_step_ends would never be called", "did you mean on_step_end"),
    ([OtherArguments()], "on_log cannot be called as", "define it as on_log(self, state, control)"),
    ([EarlyStoppingCallback()], "transformers' Trainer", "early_stopping_patience"),
]


@pytest.mark.parametrize(("callbacks", "message", "hint"), REFUSED)
def test_what_would_never_be_called_is_refused_at_once(
    callbacks: Any, message: str, hint: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        hz.train(settings(text, tmp_path / "run"), callbacks=callbacks)
    assert hint in str(caught.value.hint) and not (tmp_path / "run").exists()


def test_a_control_that_does_not_exist_is_no_silent_wish(text: Path, tmp_path: Path) -> None:
    class Wishes:
        def on_step_end(self, state: Any, control: Any) -> None:
            control.should_save = True

    with pytest.raises(CallbackError, match="should_save"):
        hz.train(settings(text, tmp_path / "run", max_steps=2), callbacks=[Wishes()])


@pytest.mark.parametrize("changes", [{}, {"streaming": True, "buffer_size": 4}], ids=["loader", "stream"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_run_leaves_no_thread_behind(
    fails: bool, changes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """Not even while somebody looks at the error, whose traceback holds on to everything."""
    during: list[int] = []

    class Look:
        def on_step_end(self, state: Any, control: Any) -> None:
            during.append(len(_data_threads()))
            if fails:
                raise RuntimeError("stop")

    before, caught = _data_threads(), None
    config = settings(text, tmp_path / "run", max_steps=2, dataloader_num_workers=2, **changes)
    try:
        train(config, callbacks=[Look()])
    except CallbackError as error:
        caught = error
    assert (caught is not None) == fails
    assert during[0] > len(before), "the control: there were some"
    for _ in range(100):
        if _data_threads() == before:
            break
        time.sleep(0.05)
    assert _data_threads() == before


def _data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("horizon-data")]
