"""`horizon report` and loss.png: each figure in them against metrics.jsonl, for runs in every state."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.errors import ConfigError, DataError, StoppedError
from horizon_lm.host_model import HostModel
from horizon_lm.outputs import TrainStepOutput
from horizon_lm.report.history import History
from horizon_lm.report.html import write_report
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.report.plot import draw_loss
from horizon_lm.training.train import train
from report_pages import Line, ended, lines_of, report_of, write_lines
from report_pages import evaluated as evaluated
from report_pages import plain as plain
from report_pages import text as text
from small_runs import settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


# Held-out loss.


def test_the_page_holds_every_held_out_loss(evaluated: Path) -> None:
    page, shown = report_of(evaluated)
    records = read_evaluations(evaluated / "metrics.jsonl")
    assert [e["step"] for e in records] == [0, 2, 4, 6]
    dots = page.dots("held")
    assert [title for *_, title in dots] == [
        f"step {e['step']}: held-out {e['eval_loss']:,.5g}" for e in records
    ]
    # Where the dots stand is what they say: a straight line leads from losses and steps to places.
    losses = [e["eval_loss"] for e in records]
    slope = (dots[-1][1] - dots[0][1]) / (losses[-1] - losses[0])
    for (x, y, _), record in zip(dots, records, strict=True):
        assert x == pytest.approx(1000 * record["step"] / 6, abs=0.1)
        assert y == pytest.approx(dots[0][1] + slope * (record["eval_loss"] - losses[0]), abs=0.2)
    assert slope < 0  # a smaller loss stands lower on the page
    cells = page.text("td")
    for record in records:
        assert f"{record['eval_loss']:.4f}" in cells
    assert f"held-out loss {losses[-1]:.4f} after step 6" in shown
    assert f"{losses[-1]:.4f}" in next(text for text in page.text("div") if text.startswith("Held-out loss"))


def test_without_evaluation_there_is_no_held_out_curve(plain: Path) -> None:
    """The control of the test above."""
    page, shown = report_of(plain)
    assert not page.dots("held") and not any(a.get("class") == "held" for _, a, _ in page.elements)
    assert "held-out loss" not in shown and any("Nothing is held out" in text for text in page.text("p"))


@pytest.mark.parametrize(("name", "curves"), [("evaluated", 1), ("plain", 0)])
def test_the_picture_has_the_held_out_curve(name: str, curves: int, request: pytest.FixtureRequest) -> None:
    metrics = request.getfixturevalue(name) / "metrics.jsonl"
    lines = {line.get_label(): line for line in draw_loss(metrics, title="a run").axes[0].lines}
    steps = read_steps(metrics)
    assert list(lines["training"].get_xdata()) == [s["step"] for s in steps]
    assert list(lines["training"].get_ydata()) == [s["loss"] for s in steps]
    assert len([label for label in lines if label == "held-out"]) == curves
    if curves:
        records = read_evaluations(metrics)
        assert list(lines["held-out"].get_xdata()) == [e["step"] for e in records]
        assert list(lines["held-out"].get_ydata()) == [e["eval_loss"] for e in records]


def test_a_run_leaves_its_picture_and_names_the_report(evaluated: Path) -> None:
    assert (evaluated / "loss.png").read_bytes().startswith(b"\x89PNG")


STOPPED = {"status": "interrupted", "error": None, "reason": "stopped by SIGTERM after step 4: saved it"}
NO_MEMORY = {"status": "failed", "error": "the host is out of memory\n  hint: free memory", "step": 4}
NO_CHECKPOINT = {"status": "failed", "error": "stopped by SIGINT after step 4; no checkpoint was saved"}


@pytest.mark.parametrize(
    ("end", "kind", "title", "why"),
    [
        ({"status": "finished", "step": 59}, "finished", "finished, 59 of 59", ""),
        ({"status": "finished", "step": 22}, "finished", "ended early, at 22 of 59", ""),
        ({**STOPPED, "step": 22}, "stopped", "stopped at 22 of 59", "Stopped by SIGTERM after step 4"),
        ({"status": "interrupted", "error": None}, "stopped", "stopped at 4 of 59", ""),  # of before
        (NO_CHECKPOINT, "stopped", "stopped at 4 of 59", "Stopped by SIGINT"),
        (NO_MEMORY, "failed", "failed at 4 of 59", "The host is out of memory"),
        ({}, "stopped", "stopped at 4 of 59", "It was killed"),
    ],
)
def test_a_report_says_how_the_run_ended(
    end: Line, kind: str, title: str, why: str, plain: Path, tmp_path: Path
) -> None:
    run = write_lines(tmp_path / "run", ended(lines_of(plain), 4, 59, **end))
    page, shown = report_of(run)
    badge = next((a, t) for tag, a, t in page.elements if tag == "span" and "state" in a.get("class", ""))
    assert badge == ({"class": f"state {kind}"}, title)
    assert title in shown.splitlines()[0]
    assert why in shown and any(why in text for text in page.text("p"))
    assert "resume" not in shown  # there is no checkpoint in this folder


def test_a_run_that_goes_on_is_running(plain: Path, tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", ended(lines_of(plain), 4, 59), end='{"event": "st')
    file = os.open(run, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        page, shown = report_of(run)
    finally:
        os.close(file)
    assert "running: 4 of 59" in page.text("span") and "running: 4 of 59" in shown
    assert "stopped at 4 of 59" in report_of(run)[1]  # the control: nobody holds the folder any more


def test_a_stopped_run_says_why_where_and_how_to_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last step is not one that is logged; resumed, its curves go on and no step comes twice."""
    honest, calls = HostModel.train_step, iter(range(1, 100))

    def train_step(self: HostModel, *arguments: Any, **others: Any) -> TrainStepOutput:
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *arguments, **others)

    run = tmp_path / "run"
    held_out = {"eval_datasets": str(text), "eval_strategy": "steps", "eval_steps": 4}
    config = settings(text, run, max_steps=12, save_steps=100, logging_steps=3, **held_out)
    with monkeypatch.context() as patch:
        patch.setattr(HostModel, "train_step", train_step)
        with pytest.raises(StoppedError):
            train(config)
    assert [s["step"] for s in read_steps(run / "metrics.jsonl")] == [1, 3, 6]
    assert lines_of(run)[-1]["step"] == 7 and "SIGTERM" in lines_of(run)[-1]["reason"]
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "run: stopped at 7 of 12\n  Stopped by SIGTERM after step 7" in shown
    assert f"to resume: horizon resume {run}" in shown and f"written: {run / 'report.html'}" in shown
    assert cli.main(["resume", str(run)]) == 0
    page, shown = report_of(run)
    assert "finished, 12 of 12" in shown
    assert [title.partition(":")[0] for *_, title in page.dots("held")] == ["step 4", "step 8", "step 12"]
    assert any("resumed after step 7" in text for text in page.text("li"))
    first = lines_of(run)[0]["plan"]["choices"]  # to the second session all settings were given
    assert {c["reason"] for c in first if not c["pinned"]} <= set(page.text("td"))
    named = {key: value for _, rows, _ in _settings_of(run) for key, value in rows}
    assert named["logging_steps"] == "3" and named["weight_decay"] == "0.0"


def _settings_of(run: Path) -> list[tuple[str, list[tuple[str, str]], bool]]:
    from horizon_lm.report.html import tables

    folder = RunFolder(run)
    found: list[tuple[str, list[tuple[str, str]], bool]] = tables(History.read(folder), folder)["settings"]
    title, rows, is_open = found[0]
    assert title == "Named by the user" and is_open and "weight_decay" not in dict(rows)
    return found


def test_steps_that_were_redone_are_shown_once(evaluated: Path, tmp_path: Path) -> None:
    lines = lines_of(evaluated)
    start = next(line for line in lines if line["event"] == "start")
    until_5 = ended(lines, 5, 6)
    redone = [
        {**line, "loss": 1.25} if line["event"] == "step" else {**line, "eval_loss": 1.5}
        for line in lines
        if line["event"] in ("step", "eval") and line["step"] > 3
    ]
    run = write_lines(
        tmp_path / "run", [*until_5, start, {"event": "resume", "step": 3, "time": start["time"]}, *redone]
    )
    page, _ = report_of(run)
    assert [title for *_, title in page.dots("held")][2:] == ["step 4: held-out 1.5", "step 6: held-out 1.5"]
    history = History.read(RunFolder(run))
    assert [s["step"] for s in history.steps] == [1, 2, 3, 4, 5, 6]
    assert [s["loss"] for s in history.steps][3:] == [1.25] * 3
    assert [s.step for s in history.sessions] == [5, 6] and history.sessions[1].resumed_at == 3


# Folders.


def test_a_new_run_takes_away_the_report_of_the_one_before(plain: Path, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    write_report(run)
    assert (run / "report.html").exists() and (run / "trace.json").exists()
    train(settings(text, run, max_steps=1, save_strategy="no", overwrite_output_dir=True))
    assert not (run / "report.html").exists() and not (run / "trace.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="report.html"):
        train(settings(text, foreign, max_steps=1, overwrite_output_dir=True))
    assert (foreign / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda run: None, "is not a run"),
        (lambda run: write_lines(run, [{"event": "start"}]), "has no step"),
        (lambda run: write_lines(run, [{"event": "step", "step": 1}], "{\n{}\n"), "is damaged"),
    ],
)
def test_what_is_no_run_is_refused(spoil: Callable[[Path], Any], match: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=match):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_bare_step_is_enough(tmp_path: Path) -> None:
    """Nothing else is needed of a file, so that none of before is refused."""
    run = write_lines(tmp_path / "run", [{"event": "step", "step": 1, "loss": 2.5}])
    page, shown = report_of(run)
    assert "loss 2.5000" in shown and "stopped at step 1" in page.text("span")
