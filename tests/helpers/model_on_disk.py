"""A small model and its tokenizer in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from horizon_lm.data import train_tokenizer
from small_runs import LLAMA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "model"
    tokenizer = train_tokenizer(["the store holds every weight"] * 50, 300)
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=300)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
