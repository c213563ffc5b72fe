"""Tokenizers: trained ones are exact and deterministic; folders without one are refused."""

from __future__ import annotations

import json
import socket
from itertools import islice

import pytest

from data_helpers import dataset
from horizon_lm.data import Documents, load_tokenizer, train_tokenizer
from horizon_lm.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(Documents([dataset("python-stdlib")], 300_000).texts(), 40), 500)


def test_a_trained_tokenizer_is_deterministic_exact_and_reloads(tokenizer, tmp_path, monkeypatch):
    again = train_tokenizer(islice(Documents([dataset("python-stdlib")], 300_000).texts(), 40), 500)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 500
    tokenizer.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(socket.socket, "connect", None)  # a local folder needs no network
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.eos_token == "<|endoftext|>" and loaded.eos_token_id == tokenizer.eos_token_id
    for text in ["  def f( x ):\n\treturn 'é😀' , 1 .\n", "\x00\x7f\n\n \t", "日本語"]:
        ids = loaded(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert loaded.decode(ids) == text


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="256 is too small"):
        train_tokenizer(["x"], 256)
    assert len(train_tokenizer([], 257)) == 257


def test_a_folder_without_a_tokenizer_is_refused(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="has no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "tokenizer_name_or_path" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "no-end")
    settings_file = tmp_path / "no-end" / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "eos_token": None}))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "no-end"))
