"""load_best_model_at_end and early stopping: transformers' decisions, the right bits, whatever interrupts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainerControl

from exported_weights import exported, weights
from faulty_runs import losses as losses
from horizon_lm import cli
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, StoppedError
from horizon_lm.outputs import perplexity
from horizon_lm.report.records import Evaluation
from horizon_lm.training.evaluate import Evaluator
from horizon_lm.training.state import Best
from horizon_lm.training.train import train
from small_runs import settings, tensors_of, write_text
from stopped_runs import stop_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

# Held-out losses by step: the best is step 4, and three evaluations after it are not better.
LOSSES = [5.0, 4.0, 4.5, 2.5, 3.0, 2.75, 2.6, 2.9]
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 100}


def evaluation(step: int, loss: float) -> Evaluation:
    return Evaluation(step, loss, perplexity(loss), 10, 0.1)


# ---- decisions --------------------------------------------------------------------------------


def by_transformers(losses: list[float], greater: bool, patience: int, threshold: float) -> tuple[Any, int]:
    """(best step, step at which the run ends) by transformers' own code; 0 where it goes on to the end."""
    callback = EarlyStoppingCallback(patience, threshold)
    arguments = SimpleNamespace(
        metric_for_best_model="eval_loss", greater_is_better=greater, save_strategy="steps"
    )
    state = SimpleNamespace(best_metric=None, global_step=0, best_global_step=None)
    trainer = SimpleNamespace(args=arguments, state=state)
    for step, loss in enumerate(losses, start=1):
        control, state.global_step = TrainerControl(), step
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})  # type: ignore[arg-type]
        Trainer._determine_best_metric(trainer, {"eval_loss": loss}, None)  # type: ignore[arg-type]
        if control.should_training_stop:
            return state.best_global_step, step
    return state.best_global_step, 0


def by_us(losses: list[float], **changes: Any) -> tuple[Any, int]:
    config = TrainConfig.from_dict(
        {"model_name_or_path": "m", "datasets": "a", "eval_datasets": "b", **BEST, **changes}
    )
    best = Best(config, Path("run"), print)
    for step, loss in enumerate(losses, start=1):
        best.add(evaluation(step, loss))
        if best.reason_to_stop:
            return best.best and best.best.step, step
    return best.best and best.best.step, 0


def test_decisions_are_those_of_transformers() -> None:
    rng = random.Random(0)
    stopped, patience_matters = 0, 0
    for case in range(300):
        losses = [round(rng.uniform(2, 3), 1) if rng.random() > 0.1 else math.nan for _ in range(12)]
        greater, patience, threshold = bool(case % 2), rng.randint(1, 5), rng.choice([0.0, 0.3])
        asked = {"greater_is_better": greater, "early_stopping_threshold": threshold}
        expected = by_transformers(losses, greater, patience, threshold)
        assert by_us(losses, early_stopping_patience=patience, **asked) == expected, losses
        stopped += expected[1] > 0
        patience_matters += by_us(losses, early_stopping_patience=patience + 1, **asked) != expected
    assert 50 < stopped < 300 and patience_matters > 50  # the controls


def test_perplexity_is_better_when_it_is_less_and_an_infinite_one_never_is() -> None:
    losses = [800.0, 3.0, 2.0, 4.0]
    for metric in ("perplexity", "eval_perplexity", "loss", "eval_loss", None):
        assert by_us(losses, metric_for_best_model=metric) == (3, 0)
    assert by_us(losses[:1], metric_for_best_model="eval_perplexity") == (None, 0)
    assert by_us(losses, metric_for_best_model="loss", greater_is_better=True) == (1, 0)  # the control


def test_a_checkpoint_that_fails_is_not_the_best_that_is_exported() -> None:
    config = TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "a", "eval_datasets": "b", **BEST})
    best = Best(config, Path("run"), print)

    def saved(step: int, path: str | None) -> None:
        best.saved(Outcome(step, Path(path) if path else None, None if path else "full", 0, 0.0))

    assert best.add(evaluation(1, 3.0))
    saved(1, "run/checkpoint-1")
    assert best.add(evaluation(2, 2.0)) and best.keep(2) == set() and best.keep(3) == {"checkpoint-1"}
    saved(2, None)
    assert best.keep(3) == {"checkpoint-1"} and best.best.step == 2  # type: ignore[union-attr]
    assert best.add(evaluation(3, 2.5))  # better than what is kept, although it is not the best
    saved(3, "run/checkpoint-3")
    assert best.to_export(9).step == 3 and not best.add(evaluation(4, 2.6))  # type: ignore[union-attr]
    assert best.add(evaluation(9, 1.0)) and best.to_export(9).path is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"early_stopping_patience": 3}, "early_stopping_patience"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
        ({"early_stopping_threshold": -0.1}, "early_stopping_threshold"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], key: str) -> None:
    values = {"model_name_or_path": "m", "datasets": "a", "eval_datasets": "b"}
    with pytest.raises(ConfigError, match=key) as caught:
        TrainConfig.from_dict({**values, **changes})
    if "strategy is no" in caught.value.message:
        assert "eval_strategy=steps" in str(caught.value.hint)
        TrainConfig.from_dict({**values, **changes, "eval_strategy": "epoch"})  # the control


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = write_text(tmp_path_factory.mktemp("data") / "text.txt").read_text().splitlines()
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations give LOSSES; returns the steps that were evaluated."""
    steps: list[int] = []

    def run(self: Evaluator, step: int) -> Evaluation:
        steps.append(step)
        return evaluation(step, LOSSES[step - 1])

    monkeypatch.setattr(Evaluator, "run", run)
    return steps


def config_of(text: Path, run: Path, **changes: Any) -> TrainConfig:
    return settings(text, run, **{"val_size": 0.2, **BEST, **changes})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("event", "time")}
        for line in lines
        if line["event"] == kind
    ]


@pytest.fixture(scope="module")
def models(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The exported model of each step from 1 to 8, by `horizon export` of an ordinary run."""
    place = tmp_path_factory.mktemp("reference")
    train(settings(text, place / "run", val_size=0.2))
    found = {}
    for step in range(1, 9):
        out = place / f"model-{step}"
        assert cli.main(["export", str(place / "run" / f"checkpoint-{step}"), str(out)]) == 0
        found[step] = weights(out)
    assert exported(place / "run") == found[8] and all(found[n] != found[n + 1] for n in range(1, 8))
    return found


def test_the_best_model_is_exported_and_kept_beside_the_latest(
    text: Path,
    models: dict[int, Any],
    scripted: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    result = train(config_of(text, run, save_steps=1, save_total_limit=1))
    assert exported(run) == models[4]
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert (result.eval_loss, result.exported_step, result.num_steps, result.stopped_by) == (2.5, 4, 8, None)
    assert (
        "the best held-out loss 2.5000 was at step 4 of 8; that model is exported" in capsys.readouterr().out
    )
    assert events(run, "best") == [{"step": 4, "metric": "eval_loss", "value": 2.5}]
    assert "trained for 4 steps" in (run / "model" / "README.md").read_text()


def test_each_new_best_is_saved_by_itself(
    text: Path, models: dict[int, Any], scripted: list[int], tmp_path: Path
) -> None:
    """Without a checkpoint by steps; those of the bests before it go (save_total_limit: 1)."""
    run = tmp_path / "run"
    train(config_of(text, run, save_strategy="no", save_total_limit=1))
    assert exported(run) == models[4] and {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-4"}
    # The last evaluation counts as well, and needs no checkpoint.
    other = tmp_path / "other"
    result = train(config_of(text, other, save_strategy="no", greater_is_better=True, max_steps=1))
    assert result.exported_step == 1 and not list(other.glob("checkpoint-*"))


def test_early_stopping_ends_a_run_as_a_finished_one(
    text: Path,
    models: dict[int, Any],
    scripted: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    result = train(config_of(text, run, early_stopping_patience=2, logging_steps=4))
    assert scripted == [1, 2, 3, 4, 5, 6] and exported(run) == models[4] and result.num_steps == 6
    who = "early stopping (no better eval_loss in 2 evaluations, the best is 2.5000 at step 4)"
    assert f"stopped at step 6 of 8 by {who}" in capsys.readouterr().out and result.stopped_by == who
    assert events(run, "stopped") == [{"step": 6, "num_steps": 8, "by": who}]
    assert [line["step"] for line in events(run, "step")] == [1, 4, 6]
    assert events(run, "end") == [{"status": "finished", "step": 6}]


@pytest.mark.parametrize(("cut", "elsewhere"), [(2, False), (4, False), (5, False), (5, True), (7, False)])
def test_a_run_that_is_cut_decides_as_one_that_is_not(
    cut: int,
    elsewhere: bool,
    text: Path,
    models: dict[int, Any],
    scripted: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Patience 3 ends the run at step 7. Cut 7: after the decision, before the export."""
    run = tmp_path / "run"
    config = config_of(text, run, early_stopping_patience=3, save_total_limit=1)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, cut)
        with pytest.raises(StoppedError):
            train(config)
    if elsewhere:  # the best lies in the folder of the run that was cut
        source, run = str(run / f"checkpoint-{cut}"), tmp_path / "other"
        train(config.replace(resume_from_checkpoint=source, output_dir=str(run)))
    else:
        assert cli.main(["resume", str(run)]) == 0
    assert scripted == [1, 2, 3, 4, 5, 6, 7] and exported(run) == models[4]
    assert "stopped at step 7 of 8 by early stopping" in capsys.readouterr().out
    assert [line["value"] for line in events(run, "best")] == [2.5]


def test_checkpoints_of_runs_without_it_can_be_gone_on_with(
    text: Path, models: dict[int, Any], scripted: list[int], tmp_path: Path
) -> None:
    """Their state knows nothing of a best evaluation: it is looked for from there on."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StoppedError):
            train(settings(text, plain, val_size=0.2))
    assert "best" not in open_checkpoint(plain / "checkpoint-4").manifest.state
    train(config_of(text, run, resume_from_checkpoint=str(plain / "checkpoint-4")))
    assert exported(run) == models[7]  # 2.6, the best of steps 5 to 8


def test_a_best_checkpoint_that_is_gone_or_damaged_is_said(
    text: Path,
    models: dict[int, Any],
    scripted: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Damage:
        def on_step_end(self, state: Any, control: Any) -> None:
            if state.step == 8:
                path = next((tmp_path / "run" / "checkpoint-4").glob("unit-*"))
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)

    train(config_of(text, tmp_path / "run", save_in_background=False), callbacks=[Damage()])
    said = capsys.readouterr().out
    assert "warning: the best model (step 4) cannot be read" in said and "checksum" in said
    assert "is exported" in said and exported(tmp_path / "run") == models[8]


def test_a_rollback_takes_evaluations_back(
    text: Path, scripted: list[int], tmp_path: Path, losses: Callable[[dict[int, float]], None]
) -> None:
    """The first try of step 7 is not finite: back to step 6. Nothing is evaluated for what was undone, and
    patience goes on from where it was."""
    losses({7: math.nan})
    run = tmp_path / "run"
    config = config_of(text, run, nonfinite="rollback", early_stopping_patience=4, save_steps=6)
    result = train(config)
    assert scripted == [1, 2, 3, 4, 5, 6, 7, 8] and result.exported_step == 4
    assert [line["step"] for line in events(run, "rollback")] == [6] and result.stopped_by is None
    state = open_checkpoint(run / "checkpoint-6").manifest.state["best"]
    assert (state["best"]["step"], state["kept"]["path"], state["waited"]) == (4, "checkpoint-4", 2)
    assert tensors_of(run / "checkpoint-4")
