"""What `loss_chunk_tokens: auto` means, and that a resumed run keeps it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import chunk_choices, chunk_tokens
from horizon_lm.training.resume import changed_settings, with_chunk_of

QWEN3 = 151_936


def test_on_a_gpu_of_a_size() -> None:
    """Unplanned: up to an eighth of the device. On the CPU 2**27 logits, whatever there is."""
    assert chunk_choices(QWEN3) == [8192, 4096, 2048, 1024, 883]
    assert chunk_choices(1 << 20) == [8192, 4096, 2048, 1024, 512, 256, 128]
    assert chunk_choices(96) == [(1 << 27) // 96]  # fewer tokens than the CPU's were of no use
    assert chunk_tokens("auto", QWEN3) == 883 and chunk_tokens("auto", QWEN3, 0) == 883
    assert chunk_tokens("auto", QWEN3, 16 << 30) == 883
    assert chunk_tokens("auto", QWEN3, 80 << 30) == 4096
    assert chunk_tokens("auto", QWEN3, 180 << 30) == 8192
    assert chunk_tokens(77, QWEN3, 80 << 30) == 77


def _config(tmp_path: Path, **changes: Any) -> TrainConfig:
    values = {"model_name_or_path": "m", "datasets": "d.txt", "output_dir": str(tmp_path)}
    return TrainConfig.from_dict({**values, **changes})


@pytest.mark.parametrize("saved", [4096, "auto"])
def test_a_resumed_run_keeps_the_choice(saved: int | str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    then = config.replace(loss_chunk_tokens=saved).to_dict()
    checkpoint: Any = SimpleNamespace(manifest=SimpleNamespace(config=then, files={}), path=tmp_path)
    resume: Any = SimpleNamespace(checkpoints=[checkpoint])
    assert changed_settings(config, checkpoint) == {}
    assert with_chunk_of(resume, config).loss_chunk_tokens == saved
    assert with_chunk_of(None, config) == config
    other = _config(tmp_path, loss_chunk_tokens=32)  # named: a change to ask about
    assert changed_settings(other, checkpoint) == {"loss_chunk_tokens": (saved, 32)}
    assert with_chunk_of(resume, other).loss_chunk_tokens == 32
