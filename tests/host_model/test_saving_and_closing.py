"""A model is saved with its tokenizer, and gives its memory back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import horizon_lm as hz
from horizon_lm.errors import ConfigError
from python_calls import MODEL, ROWS, host
from python_calls import tokenizer as tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tokenizer_is_saved_with_the_model(tokenizer: Any, tmp_path: Path) -> None:
    model = host()
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a device").input_ids
    assert ids == tokenizer("a device").input_ids
    model.save_pretrained(str(tmp_path / "again"), tokenizer=tmp_path / "out")  # the folder of one
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
    hz.HostModel.from_pretrained(tmp_path / "again", device="cpu").evaluate(ROWS)


def test_a_tokenizer_that_fails_leaves_the_old_folder(tokenizer: Any, tmp_path: Path) -> None:
    model = host()
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise ZeroDivisionError

    model.train_step(ROWS, lr=1e-2)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "out", tokenizer=Broken())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"tokenizer": "./nowhere"}, "nowhere is not a folder with a tokenizer"),
        ({"dtype": "float16"}, "dtype=float16 cannot be saved"),
        ({"dtype": torch.int8}, "dtype=int8 cannot be saved"),
        ({"max_shard_size": "many"}, "max_shard_size='many' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size=0 is not a size"),
        ({"folder": 3}, "a int is not a folder"),
        ({"folder": "notes.txt"}, "notes.txt is a file"),
        ({"folder": "."}, "holds something other than a model"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all a folder with something else in it, which would be replaced with all that it holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("precious")
    model = MODEL[0] if MODEL else host()
    with pytest.raises(ConfigError, match=message) as caught:
        model.save_pretrained(**{"folder": "out", **arguments})
    assert caught.value.hint and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_closed_model_gives_its_memory_back_and_says_so() -> None:
    with host() as model:
        model.train_step(ROWS, lr=1e-3)
        memory = weakref.ref(model.store.run("weights", 1).untyped_storage())
        held = weakref.ref(model.store)
        assert memory is not None and held() is not None
    gc.collect()
    assert held() is None and repr(model) == "HostModel(llama, closed)"
    model.close()  # once more does nothing

    def uses() -> Iterator[Callable[[], object]]:
        yield lambda: model.train_step(ROWS, lr=1e-3)
        yield lambda: model.evaluate(ROWS)
        yield lambda: model.flush()
        yield lambda: list(model.named_parameters())
        yield lambda: model.num_parameters

    for use in uses():
        with pytest.raises(ConfigError, match="this HostModel is closed"):
            use()
