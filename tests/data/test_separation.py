"""Packed documents are tried out on the model: those with a state from token to token are refused."""

from __future__ import annotations

import numpy as np
import pytest

import horizon_lm as hz
import zoo
from horizon_lm.data.rows import Row
from horizon_lm.errors import ConfigError
from horizon_lm.training.checks import change_by_place, check_separation
from packed_rows import numbered, rows_of


def host(name: str, dtype: str = "float32") -> hz.HostModel:
    return hz.HostModel.from_pretrained(zoo.build(name), device="cpu", dtype=dtype)


ROWS = rows_of(numbered([20, 11, 9, 24]), "bfd", 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "qwen3_moe"])
def test_models_that_keep_documents_apart_are_trained(name: str, dtype: str) -> None:
    model = host(name, dtype)
    check_separation(model, ROWS)
    if dtype == "float32":
        ids = np.arange(30)
        assert change_by_place(model, Row(ids, ids, np.array([19, 11]))) < 1e-5


@pytest.mark.parametrize(
    "name", ["bamba", "falcon_h1", "granitemoehybrid", "qwen3_next", "gpt_oss", "deepseek_v4"]
)
def test_models_that_carry_a_state_are_refused(name: str) -> None:
    """And gpt_oss, whose mask transformers 5.23 does not make from the position ids, and deepseek_v4, which
    compresses groups of tokens: a token of the first document never changes the second, its length does."""
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match="see each other") as caught:
            check_separation(host(name, dtype), ROWS)
    assert "packing: false" in (caught.value.hint or "")


def test_models_without_position_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes no position_ids"):
        check_separation(host("falcon_mamba"), ROWS)


def test_without_separate_documents_there_is_nothing_to_try() -> None:
    model = host("falcon_mamba")
    check_separation(model, rows_of(numbered([20, 11]), "none", 32))
    check_separation(model, rows_of(numbered([20, 11]), "wrapped", 8))
    check_separation(host("llama"), rows_of(numbered([5]), "bfd", 8))
