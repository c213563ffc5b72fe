"""Small files and settings for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.data import Documents
from horizon_lm.data.examples import Example, Text


def dataset(path: Any, **settings: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **settings)


def examples(*paths: Any, max_bytes: int | None = None, **settings: Any) -> list[Example]:
    datasets = [dataset(path, **settings) for path in paths]
    return [placed.example for placed in Documents(datasets, max_bytes)]


def read(*paths: Any, max_bytes: int | None = None, **settings: Any) -> list[str]:
    """The texts of plain text."""
    found = examples(*paths, max_bytes=max_bytes, **settings)
    assert all(isinstance(example, Text) for example in found)
    return [example.text for example in found if isinstance(example, Text)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_model": {"model_type": "llama"},
        "datasets": "absent.jsonl",
        "max_length": 16,
    }
    return TrainConfig.from_dict({**values, **changes})
