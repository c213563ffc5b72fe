"""Runs of adapters on packed weights: cut, resumed, placed elsewhere, read from the cache: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_runs import adapter_settings, by_peft, logits, make_base, state_of
from adapter_runs import text as text
from horizon_lm.errors import ConfigError, StoppedError
from horizon_lm.memory import packed
from horizon_lm.memory.store import HostStore
from horizon_lm.training.train import train
from small_runs import losses_of
from stopped_runs import stop_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

STEPS = 6


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are packed from here on."""
    found: list[int] = []
    honest = HostStore.pack

    def pack(self: HostStore, unit: int, values: torch.Tensor) -> None:
        found.append(unit)
        honest(self, unit, values)

    monkeypatch.setattr(HostStore, "pack", pack)
    return found


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_that_is_cut_ends_with_the_bits_of_one_that_is_not(
    kind: str, text: Path, tmp_path: Path, packs: list[int]
) -> None:
    """The second half under another placement, its base from the cache of the first."""
    base, cache = make_base(tmp_path / "base"), tmp_path / "cache"

    def go(run: Path, **changes: Any) -> None:
        values = {"max_steps": STEPS, "save_steps": 2, "base_dtype": kind, "dtype": "bfloat16"} | changes
        train(adapter_settings(text, run, base, **values))

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    go(straight)
    assert packs == [1, 2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, 4)
        go(cut, base_cache_dir=str(cache))
    assert packs == [1, 2] * 2
    go(cut, base_cache_dir=str(cache), resident="trainable", resume_from_checkpoint="auto")
    assert packs == [1, 2] * 2 and len(list(cache.iterdir())) == 2
    last = f"checkpoint-{STEPS}"
    assert state_of(straight / last) == state_of(cut / last)
    assert losses_of(cut)[-2:] == losses_of(straight)[-2:]
    found = logits(by_peft(cut / "model", base))
    assert torch.isfinite(found).all() and torch.equal(found, logits(by_peft(straight / "model", base)))
    with pytest.raises(ConfigError, match="base_dtype"):
        go(cut, base_dtype="auto", max_steps=STEPS + 2, resume_from_checkpoint="auto")


def test_a_missing_bitsandbytes_is_named_before_data_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise ImportError("bitsandbytes")

    monkeypatch.setattr(packed, "load_bitsandbytes", refused)
    base = make_base(tmp_path / "base")
    values = adapter_settings(text, tmp_path / "run", base, base_dtype="nf4", max_steps=1)
    packed._functions.cache_clear()
    monkeypatch.setattr("horizon_lm.training.train._prepare", None)  # what reads the data
    with pytest.raises(ConfigError, match="base_dtype=nf4 needs the package bitsandbytes") as caught:
        train(values)
    assert caught.value.hint == "pip install bitsandbytes"
    assert not (tmp_path / "run").exists()
