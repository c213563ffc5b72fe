"""A small model made from Python, and rows for it."""

from __future__ import annotations

from typing import Any

import pytest

import horizon_lm as hz
import zoo
from horizon_lm.data.tokenizer import train_tokenizer


def host(name: str = "llama", **settings: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(zoo.build(name), **{"device": "cpu", "dtype": "float32", **settings})


ROWS = zoo.batch("llama", batch_size=4)
HALVES = [{name: value[i : i + 2] for name, value in ROWS.items()} for i in (0, 2)]
MODEL: list[hz.HostModel] = []  # one for all cases


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["one layer visits a device"] * 3, 260)
