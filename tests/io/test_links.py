"""Links at any name in a run's folder are replaced and never followed: nothing outside changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.checkpoint.folder import RunFolder, claim, list_checkpoints
from horizon_lm.checkpoint.identify import identify
from horizon_lm.errors import ConfigError
from horizon_lm.io import files
from horizon_lm.report import plot
from horizon_lm.report.html import write_report
from horizon_lm.report.metrics import read_steps
from horizon_lm.training.train import train
from planted_links import SETTINGS, STAGED, Outside
from planted_links import base as base
from planted_links import outside as outside
from planted_links import run as run
from planted_links import soon as soon
from planted_links import text as text
from small_runs import settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

# What a run writes as a whole; what lies beside it meanwhile; what it goes on with.
RESULTS = ("loss.png", "report.html", "trace.json", "model")

CHECKPOINTS = ("checkpoint-3", ".tmp-checkpoint-3", ".del-checkpoint-1")
GOES_ON = ("metrics.jsonl", "tensorboard", "wandb")
KINDS = ("file", "folder", "nothing", "second name")


def plant_all(run: Path, outside: Outside, kind: str) -> None:
    names = [*RESULTS, *STAGED, *CHECKPOINTS]
    if kind == "second name":
        names.remove("model")  # a file there is refused at the start, see below
    if kind in ("file", "second name"):
        names.append(SETTINGS)  # a run's folder has one that can be read
    for name in names:
        outside.plant(run / name, kind)


def go_on(run: Path) -> int:
    return cli.main(["resume", str(run), "max_steps=3", "plot_loss=true", "save_total_limit=2"])


@pytest.mark.parametrize("kind", KINDS)
def test_links_at_all_names_are_replaced_and_never_followed(kind: str, run: Path, outside: Outside) -> None:
    """A run goes on to its end and is reported. `checkpoint-3` is taken: the checkpoint has another name."""
    plant_all(run, outside, kind)
    assert go_on(run) == 0
    write_report(run)
    assert outside.is_untouched
    for name in (*RESULTS, SETTINGS, "metrics.jsonl"):
        assert (run / name).exists() and not (run / name).is_symlink(), name
        assert (run / name).is_dir() or (run / name).stat().st_nlink == 1, name
    assert identify(run).is_finished and identify(run).step == 3
    assert [line["step"] for line in read_steps(run / "metrics.jsonl")] == [1, 2, 3]
    assert [c.manifest.step for c in list_checkpoints(run)[0]] == [3, 2]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


class _Plants:
    """A callback: plants while the run goes on."""

    def __init__(self, run: Path, outside: Outside) -> None:
        self.run, self.outside = run, outside

    def on_step_end(self, state: Any, control: Any) -> None:
        if state.step == 1:
            for name in (*RESULTS, *STAGED, ".tmp-checkpoint-2"):
                self.outside.plant(self.run / name, "file")


def test_links_that_come_while_a_run_goes_on_do_not_end_it(
    text: Path, tmp_path: Path, outside: Outside
) -> None:
    run = tmp_path / "run"
    train(settings(text, run, max_steps=2, plot_loss=True), callbacks=[_Plants(run, outside)])
    write_report(run)
    assert outside.is_untouched and identify(run).is_finished and identify(run).model == run / "model"


def test_a_new_run_in_the_place_of_another_removes_links_alone(
    text: Path, run: Path, outside: Outside
) -> None:
    for name in (*RESULTS, *STAGED, *GOES_ON[:2]):
        outside.plant(run / name, "folder")
    train(settings(text, run, max_steps=1, plot_loss=True, overwrite_output_dir=True))
    assert outside.is_untouched and identify(run).is_finished and not (run / "tensorboard").is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_goes_on_with_is_no_link(
    kind: str, run: Path, outside: Outside, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is read. A second name is harmless: the run goes on with a copy."""
    if kind == "second name":
        before = (run / "metrics.jsonl").read_text()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"event": "st')  # what a killed run was writing
        outside.plant(run / "metrics.jsonl", kind)
        assert go_on(run) == 0 and outside.is_untouched
        after = (run / "metrics.jsonl").read_text()
        assert after.startswith(before)
        added = [json.loads(line)["event"] for line in after.removeprefix(before).splitlines()]
        assert added[:2] == ["start", "resume"] and added[-1] == "end"
        return
    for name in GOES_ON:
        content = (run / name).read_bytes() if (run / name).is_file() else None
        outside.plant(run / name, kind)
        assert go_on(run) == 2
        shown = capsys.readouterr().err
        assert f"error: {run / name} is a link to {outside.place}" in shown and "hint: " in shown
        assert "reading the data" not in shown
        files.remove(run / name)
        if content is not None:
            (run / name).write_bytes(content)
    assert outside.is_untouched
    if kind == "nothing":
        assert go_on(run) == 0  # the control


def test_a_file_where_the_model_goes_is_refused_before_the_run(run: Path, outside: Outside) -> None:
    outside.plant(run / "model", "second name")
    with pytest.raises(ConfigError, match="model is a file"), claim(str(run), overwrite=False, resume=True):
        pass
    assert outside.is_untouched


@pytest.mark.parametrize("kind", ["file", "nothing", "second name"])
def test_the_look_at_what_is_outside_sees_what_follows_links(
    kind: str, run: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above, for each writer: with plain calls in place of ours all of them fail."""

    def write(path: Path, content: Any, *, below: Path | None = None) -> None:
        with path.open("wb") as file:
            content(file) if callable(content) else file.write(content.encode())

    monkeypatch.setattr(files, "write_file", write)
    monkeypatch.setattr(files, "open_log", lambda path, goes_on: path.open("a"))
    folder = RunFolder(run)
    acts: dict[str, Callable[[], object]] = {
        "loss.png": lambda: plot.plot_loss(folder.metrics, folder.picture, title="a"),
        "report.html": lambda: write_report(run),
        "trace.json": lambda: write_report(run),
        SETTINGS: lambda: folder.write_settings("max_steps: 3"),
        "metrics.jsonl": lambda: files.open_log(folder.metrics, goes_on=True).write("line\n"),
    }
    for name, act in acts.items():
        outside.plant(run / name, kind)
        act()
        assert not outside.is_untouched, name
        files.remove(run / name)
