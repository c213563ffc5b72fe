"""`horizon report` and loss.png: each figure in them against metrics.jsonl, for runs in every state."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.errors import ConfigError, DataError, StoppedError
from horizon_lm.run.charts import Series, draw, lane_boxes, thin
from horizon_lm.run.folder import RunFolder
from horizon_lm.run.history import History
from horizon_lm.run.host_model import HostModel
from horizon_lm.run.metrics import read_evaluations, read_steps
from horizon_lm.run.outputs import TrainStepOutput
from horizon_lm.run.plot import draw_loss
from horizon_lm.run.report import write_report
from horizon_lm.run.train import train
from small_runs import settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

VOID = {"meta", "br", "path", "line", "rect", "i"}
Line = dict[str, Any]


class Page(HTMLParser):
    """(tag, attributes, text within) of each element of a page; fails where tags do not fit together."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("meta", "br"):
            self.elements.append((tag, dict(attrs), ""))
        else:
            self._open.append((tag, dict(attrs), []))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, text = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        self.elements.append((tag, attributes, " ".join("".join(text).split())))

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def text(self, tag: str) -> list[str]:
        return [text for name, _, text in self.elements if name == tag]

    def dots(self, kind: str) -> list[tuple[float, float, str]]:
        """(x, y, title) of the marked points of a series."""
        found = []
        for tag, attributes, title in self.elements:
            if tag == "path" and attributes.get("class") == f"dot {kind}" and title:
                x, y = re.match(r"M([\d.]+) ([\d.]+)h", attributes["d"]).groups()  # type: ignore[union-attr]
                found.append((float(x), float(y), title))
        return found


def report_of(run: Path) -> tuple[Page, str]:
    """The page, and what the terminal shows."""
    report = write_report(run)
    assert report.written[0] == run / "report.html"
    return Page((run / "report.html").read_text()), report.text


def lines_of(run: Path) -> list[Line]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: list[Line], end: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def evaluated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that evaluates before the first and at every other one, with loss.png."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    held_out = {"eval_datasets": str(text), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    train(settings(text, run, max_steps=6, save_steps=3, plot_loss=True, **held_out))
    return run


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without anything held out."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(settings(text, run, max_steps=6, save_steps=3))
    return run


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
    assert "held-out loss" not in shown and any("Nothing was held out" in text for text in page.text("p"))


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


# How a run stands.


def ended(lines: list[Line], last: int, total: int, **end: Any) -> list[Line]:
    """The lines of a run that ended after step `last` of `total`, logged or not."""
    kept = [dict(line) for line in lines if line.get("step", 0) <= last and line["event"] != "end"]
    kept[0]["num_steps"] = total
    return [*kept, *([{"event": "end", **end, "time": kept[-1]["time"]}] if end else [])]


STOPPED = {"status": "interrupted", "error": None, "reason": "stopped by SIGTERM after step 4: saved it"}
NO_MEMORY = {"status": "failed", "error": "the host is out of memory\n  hint: free memory", "step": 4}
NO_CHECKPOINT = {"status": "failed", "error": "stopped by SIGINT after step 4: there is no checkpoint"}


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
    assert f"to go on: horizon resume {run}" in shown and f"written: {run / 'report.html'}" in shown
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
    from horizon_lm.run.figures import tables

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


# Runs of other shapes.


def test_a_file_of_before_makes_a_page(evaluated: Path, tmp_path: Path) -> None:
    """Without the fields that came later, and without config.resolved.yaml."""
    lines = lines_of(evaluated)
    for key in ("settings", "named", "data", "machine", "commit", "plan"):
        del lines[0][key]
    lines[-1] = {"event": "end", "status": "finished", "time": lines[-1]["time"]}
    run = write_lines(tmp_path / "run", lines)
    page, shown = report_of(run)
    assert "finished, 6 of 6" in shown and len(page.dots("held")) == 4
    assert any("had no plan" in text for text in page.text("p"))
    shutil.copy(evaluated / "config.resolved.yaml", run)
    page, _ = report_of(run)
    assert "Settings as config.resolved.yaml has them" in page.text("summary")
    assert any("max_grad_norm = 1 " in text for text in page.text("p"))


def test_a_run_of_one_step(plain: Path, tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", ended(lines_of(plain), 1, 1, status="finished", step=1))
    page, shown = report_of(run)
    assert "finished, 1 of 1" in shown
    loss = read_steps(run / "metrics.jsonl")[0]["loss"]
    assert [title for *_, title in page.dots("train")][0] == f"step 1: training {loss:,.5g}"


def test_losses_that_are_not_finite_leave_gaps_and_are_told(plain: Path, tmp_path: Path) -> None:
    lines = lines_of(plain)
    for line in lines:
        if line["event"] == "step" and line["step"] in (2, 3):
            line |= {"loss": None, "grad_norm": None}
    fault = {"event": "fault", "step": 3, "loss": None, "done": "not updated", "reason": "the loss is nan"}
    run = write_lines(tmp_path / "run", [*lines[:-1], {**fault, "time": lines[-1]["time"]}, lines[-1]])
    page, _ = report_of(run)
    assert "step 3 (loss –), not updated: the loss is nan" in page.text("li")
    curve = next(a["d"] for tag, a, _ in page.elements if tag == "path" and a.get("class") == "train")
    assert curve.count("M") == 2 and curve.count("L") == 2  # one point, a gap, three points
    for line in lines:
        if line["event"] == "step":
            line["loss"] = None
    page, shown = report_of(write_lines(run, lines))
    assert "loss nan" in shown and any("No record has a finite loss" in text for text in page.text("p"))


def test_a_long_run_makes_a_small_page_that_shows_the_extremes(evaluated: Path, tmp_path: Path) -> None:
    lines = lines_of(evaluated)
    kinds = {event: next(line for line in lines if line["event"] == event) for event in ("step", "eval")}
    many: list[Line] = []
    for step in range(1, 8_001):
        loss = 9.75 if step == 5_345 else 2.0 + 3.0 / step
        many.append({**kinds["step"], "step": step, "loss": loss, "num_tokens": 1000 * step})
        if step % 2 == 0:
            many.append({**kinds["eval"], "step": step, "eval_loss": 0.5 if step == 3_770 else loss})
    spans = [[f"F{i % 9}.{i}", "compute", i * 1e-4, (i + 1) * 1e-4] for i in range(10_000)]
    timeline = {"event": "timeline", "step": 3, "spans": spans, "time": lines[-1]["time"]}
    run = write_lines(tmp_path / "run", [lines[0], *many, timeline])
    page, _ = report_of(run)
    assert (run / "report.html").stat().st_size < 2_000_000
    titles = [title for *_, title in page.dots("held")]
    assert "step 3,770: held-out 0.5" in titles and len(titles) <= 502
    assert titles[0].startswith("step 2:") and titles[-1].startswith("step 8,000:")


def test_thinning_keeps_ends_and_extremes() -> None:
    ys: list[float | None] = [math.sin(x / 50) for x in range(10_000)]
    ys[1234], ys[4321], ys[7000:7050] = 5.0, -5.0, [None] * 50
    points = thin(range(10_000), ys, 400)
    assert len(points) <= 402 and points[0][0] == 0 and points[-1][0] == 9999
    assert (1234, 5.0) in points and (4321, -5.0) in points and any(y is None for _, y in points)
    assert thin([1, 2], [3.0, None], 400) == [(1, 3.0), (2, None)]


def test_an_axis_spans_its_values() -> None:
    chart = draw("loss", "nats", [Series("a", "train", [0, 10], [2.0, 4.0])])
    assert chart is not None and not chart.is_log
    ticks = {label: top for label, top in chart.y_ticks}
    assert "2" in ticks and "4" in ticks and 0 <= ticks["4"] < ticks["2"] <= 100
    assert [label for label, *_ in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    wide = draw("norm", "", [Series("a", "train", [1, 2, 3], [0.01, 1.0, 1e5])])
    assert wide is not None and wide.is_log and all(0 <= top <= 100 for _, top in wide.y_ticks)
    flat = draw("rate", "", [Series("a", "rate", [1, 2], [0.0, 0.0])], from_zero=True)
    assert flat is not None and all(math.isfinite(top) for _, top in flat.y_ticks)
    assert draw("loss", "", [Series("a", "train", [1], [None])]) is None


def test_ops_too_narrow_to_be_seen_share_a_box() -> None:
    boxes = lane_boxes([("F1.0", "compute", 0.0, 0.5), ("U2", "upload", 0.25, 1.0)])
    assert boxes == {
        "upload": [("U", 250.0, 750.0, "U2 750.000 ms")],
        "compute": [("F", 0.0, 500.0, "F1.0 500.000 ms")],
    }
    many = lane_boxes([(f"B{i}", "compute", i * 1.0, i + 1.0) for i in range(5000)], most=100)["compute"]
    assert len(many) <= 110 and sum(width for _, _, width, _ in many) == pytest.approx(1000, abs=5)


# What else is on the page.


def test_names_cannot_do_anything(evaluated: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    lines = lines_of(evaluated)
    lines[0] |= {"run_name": evil, "notes": [evil], "device": evil, "model_type": evil}
    lines[0]["data"]["files"][0]["path"] = evil
    lines[0]["settings"]["datasets"][0]["path"] = evil
    lines[0]["versions"][evil] = evil
    time = lines[-1]["time"]
    more = [
        {"event": "fault", "step": 2, "loss": 1.0, "done": evil, "reason": f"'\"><img src=x>{evil}"},
        {"event": "checkpoint", "step": 2, "seconds": 0.1, "bytes": 5, "error": evil},
        {"event": evil, "what": evil},  # of a later version
    ]
    lines[-1] |= {"status": "failed", "error": evil}
    run = write_lines(tmp_path / "run", [*lines[:-1], *({**m, "time": time} for m in more), lines[-1]])
    page, _ = report_of(run)
    source = (run / "report.html").read_text()
    assert "<script" not in source and "<img" not in source and source.count("&lt;script&gt;") >= 10
    assert not re.search(r"(src|href)\s*=\s*['\"]|@import|url\(", source.replace("img src=x", ""))
    assert {tag for tag, *_ in page.elements}.isdisjoint({"script", "img", "link", "iframe", "object"})
    assert evil in page.text("h1")


def test_the_page_tells_what_the_run_was_made_of(evaluated: Path, text: Path) -> None:
    page, _ = report_of(evaluated)
    everything = " ".join(page.text("html"))
    steps = read_steps(evaluated / "metrics.jsonl")
    header = lines_of(evaluated)[0]
    clipped = sum(s["grad_norm"] > 1.0 for s in steps)
    assert f"{clipped} of 6 recorded steps" in everything
    assert f"{text} (text)" in everything and f"{header['data']['documents']:,}" in everything
    assert header["data"]["eval_sequences"] > 0 and header["data"]["sequences"] == header["num_sequences"]
    rows = page.text("tr")  # a row is its cells without a space between them
    for name, version in header["versions"].items():
        assert f"{name}{version}" in rows
    assert header["machine"]["cpu"] in everything
    assert [t for t in page.text("td") if t.startswith("checkpoint-")] == ["checkpoint-3", "checkpoint-6"]
    peak = max(s["host_rss_bytes"] for s in steps) / 1e9
    predicted = header["plan"]["host_total"] / 1e9
    assert any(row.startswith(f"host memory, GB{predicted:,.2f}{peak:,.2f}") for row in rows)
    shares = [s["lanes"]["compute"] for s in steps if s["lanes"]]
    assert f"{sum(shares) / len(shares):.1%}" in page.text("td")
    reasons = {c["key"]: c["reason"] for c in header["plan"]["choices"] if not c["pinned"]}
    assert reasons and set(reasons.values()) <= set(page.text("td"))
    shutil.rmtree(evaluated / "checkpoint-3")
    assert "checkpoint-3 (removed)" in report_of(evaluated)[0].text("td")


def test_everybody_can_read_it(evaluated: Path) -> None:
    """Charts have a text, the page a language, a viewport and both colour schemes, and it loads nothing."""
    page, _ = report_of(evaluated)
    drawings = [a for tag, a, _ in page.elements if tag == "svg"]
    assert all(a.get("role") == "img" and a["aria-label"] or a.get("aria-hidden") for a in drawings)
    assert any("held-out" in a.get("aria-label", "") and "at step 6" in a["aria-label"] for a in drawings)
    assert next(a for tag, a, _ in page.elements if tag == "html") == {"lang": "en"}
    metas = {
        a.get("name") or a.get("http-equiv"): a.get("content") for tag, a, _ in page.elements if tag == "meta"
    }
    assert "width=device-width" in metas["viewport"] and metas["color-scheme"] == "light dark"
    assert metas["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    style = page.text("style")[0]
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "max-width" in style


def test_text_stands_out_from_its_ground(evaluated: Path) -> None:
    """Each colour of text and curves against the page's: 4.5 to 1 and more, as WCAG AA wants it of text."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = report_of(evaluated)[0].text("style")[0]
    blocks = [
        dict(re.findall(r"--(\w+): (#\w{6})", b)) for b in re.findall(r":root \{([^}]*--page[^}]*)\}", style)
    ]
    assert len(blocks) == 2
    for colours in blocks:
        for name in ("text", "soft", "train", "held", "rate", "good", "bad", "warn"):
            for ground in ("page", "card"):
                pair = sorted((light(colours[name]), light(colours[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, ground)


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
        (lambda run: None, "holds no run"),
        (lambda run: write_lines(run, [{"event": "start"}]), "holds no step"),
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
