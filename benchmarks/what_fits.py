"""Which models fit which machines, by the planner: the tables of docs/what-fits.md and README.md.

Nothing is allocated or trained, and no weights are read: the planner builds each model from its
configuration with fake tensors. For each model, GPU and way to train it finds the smallest usual size of
host memory that `horizon plan` accepts. `--write` puts the tables between the markers of both files;
`--check` plans every cell of the committed tables again and exits with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from horizon_lm.bench.models import shape
from horizon_lm.config import TrainConfig
from horizon_lm.io import files
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.outline_cache import OutlineCache

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "what-fits.md", ROOT / "README.md"

LENGTH, TOKENS = 4096, 16384  # of a sequence, and of a step
GB = 10**9
# GB of host memory that machines have.
SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# More than a machine has: what does not fit with it either is too large for the device.
UNLIMITED = 1 << 20
LADDER = (*SIZES, UNLIMITED)
# Rows of the table from RAM to model.
RAM = (32, 64, 128, 256, 512, 1024, 1536, 2048)
NONE, MORE = "-", f">{SIZES[-1]}"

# title: profile
CARDS = {"24 GB": "rtx4090", "80 GB": "h100-sxm", "141 GB": "h200-1.5tb"}
MODES: dict[str, dict[str, Any]] = {
    "14": {},
    "12": {"max_grad_norm": None},
    "10": {"moment_dtype": "bfloat16"},
    "8": {"max_grad_norm": None, "moment_dtype": "bfloat16"},
    "LoRA": {"adapter": "lora"},
    "LoRA, nf4": {"adapter": "lora", "base_dtype": "nf4"},
}
# Bytes of host memory per parameter, about: where the search begins.
BYTES = dict(zip(MODES, (14, 12, 10, 8, 2, 0.6), strict=True))
# The leanest of what the planner would choose: what fits with any choice fits with these, found faster.
LEAN = {"activations": "recompute", "slots": 2}


def _qwen3(width: int, mlp: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    found = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    return shape("qwen3-8b", **found, num_attention_heads=heads, tie_word_embeddings=tied)


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    found = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    return shape("llama-3.1-8b", **found, num_attention_heads=heads)


# Values of the published config.json; those of gpt-oss-120b are transformers' defaults.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": shape("qwen3-4b"),
    "Qwen3-8B": shape("qwen3-8b"),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "Qwen3-30B-A3B": shape("qwen3-30b-a3b"),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "gpt-oss-120b": {"model_type": "gpt_oss"},
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128),
}


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train a model on one card; the fields are keys of CARDS, MODELS and MODES."""

    card: str
    model: str
    mode: str


@dataclass
class Tables:
    """ram: GB of host memory, of LADDER; None if the device is too small. billions: parameters of a model."""

    ram: dict[Cell, int | None] = field(default_factory=dict)
    billions: dict[str, str] = field(default_factory=dict)

    def largest(self, card: str, mode: str, ram: int) -> str:
        """Return the model with the most parameters that fits."""
        fits = [m for m in self.billions if (self.ram[Cell(card, m, mode)] or UNLIMITED) <= ram]
        return max(fits, key=lambda m: float(self.billions[m]), default=NONE)


def config_of(cell: Cell, folder: Path) -> TrainConfig:
    """Return the settings of a cell. folder: receives the model's config.json, all that a plan needs."""
    files.write_file(folder / "config.json", json.dumps(MODELS[cell.model]).encode())
    is_gpt_oss = MODELS[cell.model]["model_type"] == "gpt_oss"
    return TrainConfig(
        model_name_or_path=str(folder),
        datasets=["none.jsonl"],
        max_length=LENGTH,
        tokens_per_step=TOKENS,
        device="cuda",
        attn_implementation="eager" if is_gpt_oss else "sdpa",  # as transformers: its attention has sinks
        **LEAN | MODES[cell.mode],
    )


class Model:
    """The planner for one model trained in one way; what it finds serves all cards and sizes."""

    def __init__(self, config: TrainConfig, cache: OutlineCache) -> None:
        self.config, self.outline = config, Outline(partial(model_config, config), config, cache)
        self._planners: dict[str, Planner] = {}

    def planner(self, card: str, ram: int) -> Planner:
        profile = load_profile(CARDS[card])
        pinned = frozenset(self.config.model_fields_set)
        made = self._planners.setdefault(card, Planner(self.outline, profile, Limits(0), pinned))
        return replace(made, limits=Limits.of_profile(profile, ram * GB))

    def is_accepted(self, card: str, ram: int) -> bool:
        """Whether `horizon plan` accepts it, without the suggestions that a refusal would compute."""
        planner = self.planner(card, ram)
        return planner.fits(planner.choose(self.config.replace(skip_memory_check=True)))

    def smallest(self, card: str, mode: str) -> int | None:
        """Return the smallest size of LADDER that is accepted, searched from where it should be."""
        at = self._guess(card, mode)
        if self.is_accepted(card, LADDER[at]):
            while at and self._has_room(card, LADDER[at - 1]) and self.is_accepted(card, LADDER[at - 1]):
                at -= 1
            return LADDER[at]
        if not self._has_room(card, UNLIMITED):
            return None
        return next((ram for ram in LADDER[at + 1 :] if self.is_accepted(card, ram)), None)

    def _guess(self, card: str, mode: str) -> int:
        held, device = BYTES[mode] * self.outline.num_parameters, load_profile(CARDS[card]).device_bytes
        needed = held - max(0.0, 0.9 * device - 10 * GB) + 4 * GB
        return next(i for i, ram in enumerate(LADDER) if ram * GB >= needed)

    def _has_room(self, card: str, ram: int) -> bool:
        """Whether anything fits: faster than `is_accepted`, and now and then true where that is false."""
        return self.planner(card, ram).has_room(self.config)


def models_of(name: str, folder: Path) -> Iterator[tuple[str, Model]]:
    """Yield (mode, planner of the model); modes of the same structure share its traces."""
    caches: dict[tuple, OutlineCache] = {}
    for mode, values in MODES.items():
        cache = caches.setdefault((values.get("adapter"), values.get("base_dtype")), OutlineCache())
        yield mode, Model(config_of(Cell("", name, mode), folder), cache)


def fill(name: str) -> Tables:
    """Plan all cells of one model."""
    torch.set_num_threads(1)
    tables = Tables()
    with tempfile.TemporaryDirectory() as folder:
        for mode, model in models_of(name, Path(folder)):
            tables.billions.setdefault(name, f"{model.outline.num_parameters / 1e9:.1f}")
            for card in CARDS:
                tables.ram[Cell(card, name, mode)] = found = model.smallest(card, mode)
                print(f"{name}, {card}, {mode}: {found}", flush=True)
    return tables


def wrong_cells(tables: Tables, name: str) -> list[str]:
    """Plan a model's cells again: the size must be accepted, and the next smaller one refused."""
    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for mode, model in models_of(name, Path(folder)):
            cells = [Cell(card, name, mode) for card in CARDS]
            wrong += [f"{cell}: {tables.ram[cell]}" for cell in cells if not holds(model, cell, tables)]
    return wrong


def holds(model: Model, cell: Cell, tables: Tables) -> bool:
    """Whether the planner accepts the cell's size, and refuses the next smaller one."""
    ram = tables.ram[cell]
    smaller = LADDER[-1:] if ram is None else LADDER[: LADDER.index(ram)][-1:]
    is_enough = ram is None or model.is_accepted(cell.card, ram)
    return is_enough and not any(model.is_accepted(cell.card, size) for size in smaller)


# ---- in words ---------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * 1 + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gb(ram: int | None) -> str:
    return NONE if ram is None else MORE if ram == UNLIMITED else str(ram)


def _ram(text: str) -> int | None:
    return {NONE: None, MORE: UNLIMITED}[text] if text in (NONE, MORE) else int(text)


def blocks(tables: Tables) -> dict[str, str]:
    """Return the generated tables of docs/what-fits.md by the name of their markers."""
    found = {}
    for card in CARDS:
        rows = [
            [model, billions, *(_gb(tables.ram[Cell(card, model, mode)]) for mode in MODES)]
            for model, billions in tables.billions.items()
        ]
        found[f"ram-{CARDS[card]}"] = _table(["model", "B parameters", *MODES], rows)
        sizes = [[f"{ram:,} GB", *(tables.largest(card, mode, ram) for mode in MODES)] for ram in RAM]
        found[f"largest-{CARDS[card]}"] = _table(["RAM", *MODES], sizes)
    return found


def short(tables: Tables) -> str:
    """Return the README's table: a cell has the host memory for each card."""
    rows = [
        [model, *("/".join(_gb(tables.ram[Cell(card, model, mode)]) for card in CARDS) for mode in MODES)]
        for model in tables.billions
    ]
    head = ["model", *(f"{mode} B" if mode.isdecimal() else mode for mode in MODES)]
    return _table(head, rows)


def marked(text: str, name: str) -> tuple[int, int]:
    """Return the place of a block between its markers. Raises ValueError if there is none."""
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    start = text.index(begin) + len(begin)
    return start, text.index(end, start)


def block_of(text: str, name: str) -> str:
    return text[slice(*marked(text, name))]


def with_block(text: str, name: str, block: str) -> str:
    start, end = marked(text, name)
    return text[:start] + block + text[end:]


def parse(page: str) -> Tables:
    """Read the tables by card of docs/what-fits.md."""
    tables = Tables()
    for card, profile in CARDS.items():
        lines = block_of(page, f"ram-{profile}").splitlines()
        if len(lines) < 2:
            continue  # not written yet
        head, _, *rows = [_cells(line) for line in lines]
        for model, billions, *sizes in rows:
            tables.billions[model] = billions
            for mode, ram in zip(head[2:], sizes, strict=True):
                tables.ram[Cell(card, model, mode)] = _ram(ram)
    return tables


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def write(tables: Tables) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, block in blocks(tables).items():
        page = with_block(page, name, block)
    files.write_file(PAGE, page.encode())
    readme = with_block(README.read_text(encoding="utf-8"), "what-fits", short(tables))
    files.write_file(README, readme.encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=2, help="processes, one model each")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/ and README.md")
    parser.add_argument("--check", action="store_true", help="plan the cells of the committed tables again")
    arguments = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    # Largest first, so that no process is left alone with them; the tables keep the order of MODELS.
    names = [name for name in reversed(MODELS) if name in arguments.models]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        if arguments.check:
            wrong = [row for rows in pool.map(partial(wrong_cells, parse(page)), names) for row in rows]
            print("\n".join([*wrong, f"{len(wrong)} cells differ"]))
            return int(bool(wrong))
        found = dict(zip(names, pool.map(fill, names), strict=True))
    tables, billions = parse(page), {name: one.billions[name] for name, one in found.items()}
    for one in found.values():
        tables.ram |= one.ram
    known = tables.billions | billions
    tables.billions = {name: known[name] for name in MODELS if name in known}
    if arguments.write:
        write(tables)
    print(short(tables))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
