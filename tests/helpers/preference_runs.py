"""Small runs on preferences: data with long, short and repeated prompts, and their settings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import small_runs
from horizon_lm.config import TrainConfig

_WORDS = ["red", "blue", "green", "seven", "cat", "dog", "bird", "runs", "sleeps", "eats", "fish", "house"]


def write_pairs(folder: Path, rows: int = 24, seed: int = 0) -> Path:
    """Write pairs.jsonl (prompt, chosen, rejected)."""
    draw = random.Random(seed)
    lines = [
        {"prompt": _say(draw, 6), "chosen": _say(draw, 9, " "), "rejected": _say(draw, 9, " ") + " no"}
        for _ in range(rows)
    ]
    return _write(folder / "pairs.jsonl", lines)


def write_labelled(folder: Path, rows: int = 24, seed: int = 0) -> Path:
    """Write labelled.jsonl (prompt, completion, label)."""
    draw = random.Random(seed)
    lines = [
        {"prompt": _say(draw, 6), "completion": _say(draw, 9, " "), "label": draw.random() < 0.5}
        for _ in range(rows)
    ]
    return _write(folder / "labelled.jsonl", lines)


def _say(draw: random.Random, most: int, before: str = "") -> str:
    """before: completions begin with a space, so that all tokenisers end the prompt where it ends."""
    return before + " ".join(draw.choice(_WORDS) for _ in range(draw.randint(2, most)))


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """Settings of a run that writes no checkpoint but the last, and holds nothing out."""
    values = {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 64,
        "max_steps": 4,
        "plot_loss": False,
        "dataset_cache_dir": str(output_dir.parent / "cache"),
    }
    return small_runs.settings(data, output_dir, **{**values, **changes})
