"""Reports of runs of unusual shapes, and what else is on the page."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest

from horizon_lm.report.charts import Series, draw, lane_boxes, thin
from horizon_lm.report.metrics import read_steps
from horizon_lm.report.svg import FILLS
from horizon_lm.schedule.draw import MEANING
from report_pages import Line, ended, lines_of, report_of, write_lines
from report_pages import evaluated as evaluated
from report_pages import plain as plain
from report_pages import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


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
    assert "Settings in config.resolved.yaml" in page.text("summary")
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


def test_ops_have_the_colours_of_drawings(plain: Path, tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", lines_of(plain))
    report_of(run)
    light, dark = (run / "report.html").read_text().split("@media (prefers-color-scheme: dark)")
    for kind in MEANING:
        assert f"--{kind}: {FILLS[kind][0]};" in light and f"--{kind}: {FILLS[kind][1]};" in dark


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
