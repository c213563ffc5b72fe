"""The smallest configuration, written to a file, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horizon_lm.config import load_config
from horizon_lm.errors import ConfigError

BASE: dict[str, Any] = {"model_name_or_path": "folder", "datasets": "text.jsonl"}


def write(folder: Path, content: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message_of(content: str, folder: Path) -> tuple[str, str | None]:
    """The fault of a file with this content, the file's folder removed."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, content))
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value)
    return caught.value.message.replace(f"{folder}/", ""), caught.value.hint


GOOD = "model_name_or_path: m\ndatasets: d\n"
