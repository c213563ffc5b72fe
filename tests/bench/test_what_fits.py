"""The tables of docs/what-fits.md and README.md are the planner's."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import what_fits
from benchmarks.what_fits import CARDS, LADDER, LEAN, MODELS, MODES, PAGE, README, UNLIMITED, Cell, Tables

from horizon_lm.errors import DoesNotFitError
from horizon_lm.plan import fit
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.run_plan import plan_run

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [
    Cell("24 GB", "Qwen3-14B", "LoRA"),
    Cell("24 GB", "Llama-3.1-70B", "14"),
]
WITH_ALL_CHOICES = Cell("24 GB", "Qwen3-4B", "10")
CACHES = defaultdict(OutlineCache)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return what_fits.parse(PAGE.read_text())


def model_of(cell: Cell, folder: Path) -> what_fits.Model:
    return what_fits.Model(what_fits.config_of(cell, folder), cache_of(cell))


def cache_of(cell: Cell) -> OutlineCache:
    return CACHES[cell.model, MODES[cell.mode].get("adapter")]


def differing(page: str, readme: str) -> list[str]:
    """Return the blocks that are not what the script writes for the tables by card."""
    tables = what_fits.parse(page)
    blocks = what_fits.blocks(tables)
    wrong = [name for name, block in blocks.items() if what_fits.block_of(page, name) != block]
    is_short = what_fits.block_of(readme, "what-fits") == what_fits.short(tables)
    return wrong if is_short else [*wrong, "README"]


def test_all_tables_are_those_of_the_script(tables: Tables) -> None:
    assert list(tables.billions) == list(MODELS)
    assert set(tables.ram) == {Cell(c, m, w) for c in CARDS for m in MODELS for w in MODES}
    assert not differing(PAGE.read_text(), README.read_text())


def test_a_changed_table_is_found() -> None:
    page, readme = PAGE.read_text(), README.read_text()
    start, end = what_fits.marked(page, "largest-rtx4090")
    assert differing(page[:end] + " " + page[end:], readme) == ["largest-rtx4090"]
    row = next(line for line in readme.splitlines() if line.startswith("| Qwen3-8B"))
    assert differing(page, readme.replace(row, row.replace("/", "/9", 1))) == ["README"]


def test_more_room_never_takes_more_memory(tables: Tables) -> None:
    """Larger cards and fewer bytes per parameter need no more RAM; None needs the most."""

    def ram(card: str, model: str, mode: str) -> int:
        return tables.ram[Cell(card, model, mode)] or 2 * UNLIMITED

    for model in MODELS:
        for mode in MODES:
            of_cards = [ram(card, model, mode) for card in CARDS]
            assert of_cards == sorted(of_cards, reverse=True)
        for card in CARDS:
            for modes in (("14", "12", "8"), ("14", "10", "8"), ("8", "LoRA")):
                of_modes = [ram(card, model, mode) for mode in modes]
                assert of_modes == sorted(of_modes, reverse=True), (card, model, modes)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.model} {c.mode}, {c.card}")
def test_a_cell_is_the_planners(cell: Cell, tables: Tables, tmp_path: Path) -> None:
    model, ram = model_of(cell, tmp_path), tables.ram[cell]
    assert ram is not None and what_fits.holds(model, cell, tables)
    above, below = LADDER[LADDER.index(ram) + 1], LADDER[: LADDER.index(ram)][-1:]
    for other in (above, *below):
        assert not what_fits.holds(model, cell, Tables({cell: other}))


def test_the_planner_itself_agrees(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all choices left to it. Its suggestions take longer than its refusal and are not looked at."""
    monkeypatch.setattr(fit, "hint", lambda *_: "")
    cell, cache = WITH_ALL_CHOICES, cache_of(WITH_ALL_CHOICES)
    ram = tables.ram[cell]
    assert ram is not None and ram > LADDER[0]
    lean = what_fits.config_of(cell, tmp_path)
    given = frozenset(lean.model_fields_set - LEAN.keys())
    config = lean.replace(activations="auto", host_memory_gb=float(ram))
    plan = plan_run(config, CARDS[cell.card], given, cache)
    assert plan.prediction.host_bytes < (ram - config.reserve_host_gb) * what_fits.GB
    planner = what_fits.Model(config, cache).planner(cell.card, LADDER[LADDER.index(ram) - 1])
    with pytest.raises(DoesNotFitError, match="host memory"):
        replace(planner, pinned=given).choose(config)
