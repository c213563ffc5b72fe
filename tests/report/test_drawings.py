"""Drawings of steps and of memory: geometry, words, themes, colours, and the verb `horizon draw`."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from benchmarks import drawings

from horizon_lm import cli
from horizon_lm.report import svg
from horizon_lm.report.memory_drawing import GROUPS, OTHER, Memory, describe, draw_memory, group_of, segments
from horizon_lm.report.step_drawing import (
    LEFT,
    RIGHT,
    Box,
    Row,
    by_lane,
    by_unit,
    draw_step,
    one_at_a_time,
    tick_step,
    unit_names,
)
from horizon_lm.report.svg import FILLS, THEMES, Caption, contrast, text_on
from horizon_lm.schedule import Lane, Op, StepSpec, build, simulate
from horizon_lm.schedule.draw import MEANING, Span
from horizon_lm.schedule.ops import LANE_OF_KIND

CAPTION = Caption("A step", ("a model", "a machine"), "SIMULATED")
SVG = "{http://www.w3.org/2000/svg}"
ASSETS = Path(__file__).parents[2] / "docs" / "assets"


def step(layers: int = 6, **changes: object) -> list[Span]:
    """A simulated step with deferred updates whose lanes overlap."""
    units = frozenset(range(layers + 3))
    values = {"micro_batches": 2, "update": "deferred", "embedding_unit": layers + 2} | changes
    spec = StepSpec(layers=layers, uploaded=units, trainable=units, **values)
    seconds = {"U": 0.010, "F": 0.020, "L": 0.050, "B": 0.041, "D": 0.012, "O": 0.031, "N": 1e-5}
    return simulate(build(spec, pending=spec.trainable), lambda op: seconds.get(op.kind, 0.01)).spans


def one_by_one(spans: list[Span]) -> list[Span]:
    """The same ops as the CPU runs them."""
    found, now = [], 0.0
    for op, start, end in spans:
        found.append((op, now, now := now + (end - start)))
    return found


SPANS = step()


# ---- geometry ---------------------------------------------------------------------------------


def rows_of(spans: list[Span], kind: str) -> tuple[list[Row], float]:
    scale = (RIGHT - LEFT) / (max(s[2] for s in spans) - min(s[1] for s in spans))
    return (by_lane if kind == "lanes" else by_unit)(spans, 100.0, scale), scale


def overlap(one: Box, other: Box) -> bool:
    return (
        one.x + one.width > other.x + 1e-6
        and other.x + other.width > one.x + 1e-6
        and one.top + one.height > other.top + 1e-6
        and other.top + other.height > one.top + 1e-6
    )


def faults(rows: list[Row]) -> list[str]:
    """What is wrong with the geometry of rows."""
    found = []
    for row in rows:
        for box in row.boxes:
            if box.top < row.top - 1e-6 or box.top + box.height > row.top + row.height + 1e-6:
                found.append(f"{box} leaves {row.name}")
            if box.x < LEFT - 1e-6 or box.x + box.width > RIGHT + 1e-6:
                found.append(f"{box} leaves the plot")
        found += [f"{a} on {b}" for a, b in combinations(row.boxes, 2) if overlap(a, b)]
    found += [f"{b.name} on {a.name}" for a, b in pairwise(rows) if a.top + a.height > b.top]
    return found


@pytest.mark.parametrize("kind", ["lanes", "units"])
@pytest.mark.parametrize("layers", [1, 6, 40])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_boxes_are_in_their_rows_and_do_not_overlap(kind: str, layers: int, is_cpu: bool) -> None:
    spans = one_by_one(step(layers)) if is_cpu else step(layers)
    rows, _ = rows_of(spans, kind)
    assert not faults(rows)
    assert len(rows) == (4 if kind == "lanes" else layers + 4)


def test_the_check_of_geometry_sees_what_is_wrong() -> None:
    fine = Row("a", 0, 30, (Box("F", LEFT, 10, 0, 30), Box("B", LEFT + 10, 10, 0, 30)))
    assert not faults([fine])
    for boxes in (
        (Box("F", LEFT, 10, 0, 30), Box("B", LEFT + 9, 10, 0, 30)),
        (Box("F", LEFT - 1, 10, 0, 30),),
        (Box("F", RIGHT - 5, 10, 0, 30),),
        (Box("F", LEFT, 10, 0, 31),),
    ):
        assert faults([Row("a", 0, 30, boxes)])
    assert faults([fine, Row("b", 29, 30, ())])


def test_widths_and_places_are_proportional_to_time() -> None:
    rows, scale = rows_of(SPANS, "lanes")
    boxes = {box.label: box for row in rows for box in row.boxes if box.label}
    drawn = 0
    for op, start, end in SPANS:
        if (end - start) * scale < 1.5:
            continue
        x = LEFT + start * scale
        (box,) = (b for row in rows for b in row.boxes if b.label == str(op) and abs(b.x - x) < 1e-6)
        assert box.width == pytest.approx((end - start) * scale)
        drawn += 1
    assert drawn > 50
    by_name = {row.name: row for row in rows}
    assert boxes["F1.0"] in by_name["compute"].boxes and boxes["O1"] in by_name["update"].boxes


def test_a_longer_axis_makes_the_same_step_shorter() -> None:
    def loss(drawing: str) -> float:
        return float(
            re.findall(r'<rect class="L" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="36"', drawing)[0]
        )

    seconds = max(end for _, _, end in SPANS)
    whole, half = (draw_step(SPANS, CAPTION, rows="lanes", until=until) for until in (0, 2 * seconds))
    assert loss(whole) - LEFT == pytest.approx(2 * (loss(half) - LEFT), abs=0.1)
    assert whole == draw_step(SPANS, CAPTION, rows="lanes", until=seconds / 2)  # no op is cut


def test_ops_that_overlap_in_a_lane_share_its_height() -> None:
    spans = [(Op("U", 1), 0.0, 2.0), (Op("U", 2), 1.0, 3.0), (Op("U", 3), 3.0, 4.0)]
    (row,), _ = rows_of(spans, "lanes")
    assert not faults([row])
    assert [box.height for box in row.boxes] == [row.height / 2, row.height / 2, row.height]


def test_the_shortest_op_is_visible_also_at_the_end() -> None:
    rows, _ = rows_of(SPANS, "lanes")
    norm = next(box for row in rows for box in row.boxes if box.kind == "N")
    assert norm.width >= 1.5 and norm.x + norm.width <= RIGHT + 1e-6


def test_forward_leads_down_and_backward_up() -> None:
    spans = one_by_one(SPANS)
    rows, _ = rows_of(spans, "units")
    assert [row.name for row in rows[:3]] == ["embedding", "prologue", "layer 0"]
    assert [row.name for row in rows[-2:]] == ["head", "all units"]
    places = {box.label: box for row in rows for box in row.boxes}
    down = [places[f"F{u}.0"] for u in range(7)]
    up = [places[f"B{u}.1"] for u in range(6, -1, -1)]
    assert all(a.x < b.x and a.top < b.top for a, b in pairwise(down))
    assert all(a.x < b.x and a.top > b.top for a, b in pairwise(up))


def test_a_tied_table_has_the_row_of_the_head() -> None:
    tied = [s for s in SPANS if s[0].unit != 8]
    assert list(unit_names(tied).values())[0] == "prologue" and "embedding" not in unit_names(tied).values()


def test_rows_are_of_units_if_nothing_overlaps() -> None:
    alone = one_by_one(SPANS)
    assert one_at_a_time(alone) and not one_at_a_time(SPANS)
    assert draw_step(alone, CAPTION) == draw_step(alone, CAPTION, rows="units")
    assert draw_step(SPANS, CAPTION) == draw_step(SPANS, CAPTION, rows="lanes")
    assert draw_step(SPANS, CAPTION, rows="units") != draw_step(SPANS, CAPTION, rows="lanes")


def test_thousands_of_ops_make_a_small_drawing() -> None:
    spans = step(80, micro_batches=100)
    assert len(spans) > 15_000
    for rows in ("lanes", "units"):
        assert len(draw_step(spans, CAPTION, rows=rows)) < 100_000
    rows_drawn, scale = rows_of(spans, "lanes")
    (row,) = (row for row in rows_drawn if row.name == "compute")
    assert 300 < len(row.boxes) <= 2 * (RIGHT - LEFT)
    busy = sum(end - start for op, start, end in spans if op.lane is Lane.COMPUTE)
    assert sum(box.width for box in row.boxes) == pytest.approx(
        busy * scale, rel=0.05
    )  # merged, not left out


@pytest.mark.parametrize("seconds", [3e-6, 0.0021, 0.3, 1.0, 7.11, 31.9, 86_400.0])
def test_an_axis_has_few_round_ticks(seconds: float) -> None:
    tick = tick_step(seconds)
    assert 2 <= seconds / tick <= 7 + 1e-9
    assert f"{tick:e}"[0] in "125"


# ---- the file ---------------------------------------------------------------------------------


def texts(drawing: str) -> list[str]:
    return [t.text or "" for t in ET.fromstring(drawing).iter(f"{SVG}text")]


@pytest.mark.parametrize("theme", THEMES)
def test_a_drawing_is_one_self_contained_file(theme: str) -> None:
    drawing = draw_step(SPANS, CAPTION, theme=theme)
    root = ET.fromstring(drawing)
    assert root.get("role") == "img" and root.get("viewBox")
    ids = {e.get("id"): e for e in root.iter() if e.get("id")}
    title, desc = (ids[i].text or "" for i in str(root.get("aria-labelledby")).split())
    assert title == "A step, simulated" and "compute" in desc
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "svg",
        "title",
        "desc",
        "style",
        "rect",
        "path",
        "text",
    }
    assert not re.search(r"url\(|@import|@font-face|href|<script|\bon\w+=", drawing)
    assert drawing.count("http") == 1  # the name space
    assert ("prefers-color-scheme" in drawing) == (theme == "auto")
    assert {
        "SIMULATED",
        "A step",
        "a model",
        "a machine",
        "upload",
        "compute",
        "forward",
        "optimizer",
    } <= set(texts(drawing))


def shown(drawing: str, pixels: int) -> list[str]:
    """Return the words of a drawing that a page of this width shows."""
    hidden = "wide" if pixels <= svg._NARROW else "narrow"
    assert f".{hidden}{{display:none}}" in drawing
    return [
        t.text or ""
        for t in ET.fromstring(drawing).iter(f"{SVG}text")
        if hidden not in str(t.get("class")).split()
    ]


@pytest.mark.parametrize("pixels", [420, 900])
def test_simulated_is_said_once_on_every_page(pixels: int) -> None:
    drawing = draw_step(SPANS, CAPTION)
    assert shown(drawing, pixels).count("SIMULATED") == 1
    unsaid = drawing.replace("soft narrow", "soft wide")  # the mark of wide pages alone
    assert shown(unsaid, 420).count("SIMULATED") == 0
    long = svg.Caption(CAPTION.title, ["x" * 200, "y" * 200], "SIMULATED")
    last = [words for words in shown(draw_step(SPANS, long), 420) if words.startswith("yy")][0]
    room = svg.WIDTH - 2 * svg.MARGIN - svg.text_width("SIMULATED", 18)
    assert svg.text_width(last, 17) <= room < svg.text_width("y" * 200, 17)


def test_themes_differ_in_colours_alone() -> None:
    def body(drawing: str) -> str:
        return re.sub(r"<style>.*?</style>", "", drawing, flags=re.S)

    light, dark, auto = (draw_step(SPANS, CAPTION, theme=theme) for theme in ("light", "dark", "auto"))
    assert body(light) == body(dark) == body(auto) and light != dark
    in_light, in_dark = (f".frame{{fill:{page}" for page in svg._PAGE["page"])
    assert in_light in light and in_light not in dark and in_dark in dark and in_dark not in light
    assert in_light in auto.partition("@media")[0] and in_dark in auto.partition("@media")[2]


def test_a_drawing_is_a_function_of_what_it_shows() -> None:
    assert draw_step(SPANS, CAPTION) == draw_step(list(SPANS), CAPTION)
    assert draw_step(SPANS[:-1], CAPTION) != draw_step(SPANS, CAPTION)


EVIL = 'a<script>alert("1")</script>&\x00\x1b[31m\n]]>' + "'"


def test_words_are_escaped_and_secrets_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-some-length")
    caption = Caption(EVIL, (EVIL, "a-secret-of-some-length"), EVIL)
    for drawing in (draw_step(SPANS, caption), draw_memory([Memory(EVIL, {"weights": 3}, 9)], caption)):
        ET.fromstring(drawing)  # well-formed
        assert "<script" not in drawing and "\x00" not in drawing and "\x1b" not in drawing
        assert "a-secret" not in drawing and "***" in drawing
    with pytest.raises(ET.ParseError):
        ET.fromstring(draw_step(SPANS, CAPTION).replace("A step", EVIL))  # without escaping


def test_words_that_are_too_long_are_cut() -> None:
    drawing = draw_step(SPANS, Caption("w" * 400, ("m" * 400,), "MEASURED"))
    shown = [t for t in texts(drawing) if t.endswith("…")]
    assert len(shown) == 2 and all(len(t) < 80 for t in shown)
    assert svg.clipped("short", 18, 800) == "short"


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="theme 'pink'"):
        draw_step(SPANS, CAPTION, theme="pink")
    with pytest.raises(ValueError, match="rows 'columns'"):
        draw_step(SPANS, CAPTION, rows="columns")
    with pytest.raises(ValueError, match="no spans"):
        draw_step([], CAPTION)


# ---- colours ----------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1: protanopia, deuteranopia, tritanopia.
BLIND = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    np.eye(3),
)


def lab(colour: str, matrix: object) -> np.ndarray:
    """CIELAB of a colour as one with this kind of vision sees it."""
    rgb = np.clip(np.array(matrix) @ [svg.linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)], 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum((np.array(to_xyz) @ rgb) / [0.9505, 1.0, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one: str, other: str) -> float:
    """The smallest difference (CIE76) that any of the kinds of vision sees."""
    return min(float(np.linalg.norm(lab(one, m) - lab(other, m))) for m in BLIND)


def neighbours() -> Iterator[tuple[str, str]]:
    """Kinds of one lane, and those of nearly every step."""
    kinds = [k for k in MEANING if k != "E"]  # E looks like L, and never occurs with it
    for one, other in combinations(kinds, 2):
        is_main = {one, other} <= set("UFLBDO")
        if is_main or LANE_OF_KIND[one] is LANE_OF_KIND[other]:
            yield one, other


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize(("one", "other"), sorted(neighbours()))
def test_colours_can_be_told_apart_by_everybody(one: str, other: str, theme: int) -> None:
    assert difference(FILLS[one][theme], FILLS[other][theme]) > 10


def test_red_and_green_cannot() -> None:
    assert difference("#c2504d", "#6b7a2f") < 10 < difference("#c0504d", "#1f6fb4")


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out(theme: int) -> None:
    for kind, fill in FILLS.items():
        assert contrast(text_on(fill[theme]), fill[theme]) >= 4.5, kind
    for role in ("text", "soft"):
        for ground in ("page", "track"):
            assert contrast(svg._PAGE[role][theme], svg._PAGE[ground][theme]) >= 4.5
    assert contrast("#777777", "#999999") < 4.5


def test_every_kind_of_op_has_a_colour() -> None:
    assert set(MEANING) == set(LANE_OF_KIND) and set(MEANING) <= set(FILLS)


# ---- memory -----------------------------------------------------------------------------------

HOST = Memory(
    "Host memory", {"weights": 20, "residual": 20, "exp_avg": 30, "exp_avg_sq": 10, "process": 1}, 100
)


def test_a_bar_is_divided_in_proportion() -> None:
    found = segments(HOST)
    assert [(s.name, s.bytes) for s in found] == [
        ("weights", 20),
        ("residuals of fp32 masters", 20),
        ("optimizer moments", 40),
        ("process", 1),
        ("free", 19),
    ]
    assert sum(s.width for s in found) == pytest.approx(svg.WIDTH - 2 * svg.MARGIN)
    assert all(b.x == pytest.approx(a.x + a.width) for a, b in pairwise(found))
    assert found[0].width / found[2].width == pytest.approx(20 / 40)
    assert "81 bytes of 100 bytes" in describe([HOST])


def test_a_memory_that_is_too_small_has_nothing_free() -> None:
    found = segments(Memory("Device memory", {"graph": 30}, 10))
    assert [s.name for s in found] == ["activations"] and found[0].width <= svg.WIDTH - 2 * svg.MARGIN


def test_parts_that_nobody_knows_are_shown() -> None:
    assert group_of("a new part") == OTHER and group_of("resident_grads")[0] == "resident units"
    (one, *_) = segments(Memory("m", {"a new part": 3}, 3))
    assert one.name == "other" and one.bytes == 3


def test_groups_have_words_and_colours() -> None:
    drawing = draw_memory([HOST], CAPTION)
    assert {"weights 20 bytes", "Host memory", "81 bytes of 100 bytes"} <= set(texts(drawing))
    assert {kind for _, kind, _ in GROUPS} | {OTHER[1]} <= set(FILLS)


# ---- the drawings in docs/assets ----------------------------------------------------------------


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return drawings.steps(drawings.UPDATES)


def test_committed_drawings_are_what_the_planner_simulates_now(now: dict[str, str]) -> None:
    """`make drawings` remakes them."""
    for name, drawing in now.items():
        assert (ASSETS / f"{name}.svg").read_text() == drawing, name


def test_the_page_gives_the_seconds_of_its_drawings() -> None:
    page = (ASSETS.parent / "how-it-works.md").read_text()
    scenes = drawings.UPDATES | drawings.PLACES
    seconds = {name: scene.plan().prediction.seconds for name, scene in scenes.items()}
    for name in drawings.UPDATES:
        assert f"({seconds[name]:.2f} s" in page, name
    streamed, rounds = (round(seconds[name] * 1e3) for name in drawings.PLACES)
    assert f"from {streamed} to {rounds} ms" in page
    compute = drawings.WHOLE["step-whole"].plan().prediction
    assert f"{compute.lanes()['compute'] / compute.seconds:.0%}".replace("%", " %") + " of this step" in page


def test_the_page_shows_every_drawing_that_is_committed() -> None:
    page = (ASSETS.parent / "how-it-works.md").read_text()
    shown = set(re.findall(r"\(assets/([\w-]+)\.svg\)", page))
    made = {*drawings.UPDATES, *drawings.PLACES, *drawings.WHOLE, *drawings.MEMORY}
    assert shown == made | {"step-recorded"}
    for name in made:
        assert ("PLANNED" if "memory" in name else "SIMULATED") in texts((ASSETS / f"{name}.svg").read_text())
    for name in ("step-light", "step-dark", "step-recorded"):
        assert "MEASURED" in texts((ASSETS / f"{name}.svg").read_text())


def test_every_group_of_the_planned_memory_is_known() -> None:
    (scene,) = drawings.MEMORY.values()
    plan = scene.plan()
    parts = [*plan.prediction.host, *plan.prediction.device]
    assert len(parts) > 12 and not [part for part in parts if group_of(part) == OTHER]
    assert plan.prediction.device_bytes < plan.profile.device_bytes


# ---- the verb -----------------------------------------------------------------------------------


def recorded(folder: Path, *, timeline: bool = True) -> Path:
    """A run's folder with two steps."""
    header = {"event": "start", "run_name": "<b>tiny</b>", "device": "cpu", "num_threads": 1, "num_steps": 2}
    header |= {"model_type": "llama", "num_parameters": 37_120, "machine": {"cpu": "a CPU"}}
    spans = [[str(op), str(op.lane), start, end] for op, start, end in one_by_one(SPANS)]
    lines = [header, *({"event": "step", "step": n, "loss": 2.0, "num_tokens": 64 * n} for n in (1, 2))]
    if timeline:
        lines.append({"event": "timeline", "step": 2, "spans": spans, "time": "2026-11-30T13:03:40+00:00"})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_recorded_step_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path / "run")
    assert cli.main(["draw", str(run)]) == 0
    assert f"written: {run / 'step.svg'}" in capsys.readouterr().out
    shown = texts((run / "step.svg").read_text())
    assert "MEASURED" in shown and "A training step of <b>tiny</b>" in shown
    assert {"embedding", "head", "layer 5", "loss"} <= set(shown)
    assert "llama · 37,120 parameters · 64 tokens a step · step 2 of 2" in shown
    assert "a CPU · 1 thread · 2026-11-30" in shown
    other = tmp_path / "new" / "other.svg"
    assert cli.main(["draw", str(run), "--rows", "lanes", "--theme", "dark", "--out", str(other)]) == 0
    assert (
        "compute" in texts(other.read_text())
        and "#ffffff}" not in other.read_text().partition(".frame")[2][:40]
    )


def test_a_drawing_in_a_run_replaces_a_link(tmp_path: Path) -> None:
    run, mine = recorded(tmp_path / "run"), tmp_path / "mine"
    mine.write_text("mine")
    (run / "step.svg").symlink_to(mine)
    assert cli.main(["draw", str(run)]) == 0
    assert mine.read_text() == "mine" and not (run / "step.svg").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["EMPTY"], 4, "is not a run"),
        (["RUN"], 4, "has no recorded step"),
        ([], 2, "needs a run or settings"),
        (["nowhere.yaml"], 2, "no such file"),
        (["EMPTY", "--theme", "pink"], 2, "--theme 'pink'"),
        (["EMPTY", "--rows", "columns"], 2, "--rows 'columns'"),
        (["EMPTY", "--memory"], 2, "settings are for plans"),
        (["EMPTY", "learning_rate=1"], 2, "settings are for plans"),
        (["EMPTY", "hardware=gh200"], 2, "settings are for plans"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "RUN": str(recorded(tmp_path / "run", timeline=False))}
    assert cli.main(["draw", *(places.get(a, a) for a in arguments)]) == code
    error = capsys.readouterr().err
    assert words in error and "hint: " in error
    assert not list(tmp_path.rglob("*.svg"))


def test_a_planned_step_and_its_memory_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    settings = [f"init_model={json.dumps(tiny)}", "datasets=none.txt", "max_length=32", "max_steps=1"]
    settings += ["per_device_train_batch_size=1", "activations=recompute", "hardware=rtx4090"]
    assert cli.main(["draw", *settings]) == 0
    step = texts((tmp_path / "step.svg").read_text())
    assert "SIMULATED" in step and "download" in step and any("RTX 4090" in t for t in step)
    assert cli.main(["draw", "--memory", *settings]) == 0
    memory = texts((tmp_path / "memory.svg").read_text())
    assert "PLANNED" in memory and "Host memory" in memory and "Device memory" in memory
    assert any(t.endswith("of 24.0 GB") for t in memory) and any(t.endswith("of 128 GB") for t in memory)
    assert not any("other" in t for t in memory)


def test_lanes_are_in_their_order() -> None:
    rows, _ = rows_of(SPANS, "lanes")
    order = [str(lane).replace("_", " ") for lane in Lane]
    assert [row.name for row in rows] == [name for name in order if name in {row.name for row in rows}]
