"""`new_tokens`: special tokens beside those of a model, with embeddings for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from horizon_lm.checkpoint.exported import Form, export_checkpoint
from horizon_lm.config import TrainConfig
from horizon_lm.data import load_training_data
from horizon_lm.data.tokenizer import add_new_tokens, load_tokenizer, train_tokenizer
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.model.loading import grow_vocabulary
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.training.build import build_model
from horizon_lm.training.eval_command import evaluate_model
from horizon_lm.training.generate import Generator, Sampling
from horizon_lm.training.train import train
from small_runs import LLAMA, settings, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

NEW = ["<think>", "</think>", "<tool>"]
TEXT = "the <think>store holds</think> every weight while <tool> one layer visits a device\n"
ROWS = 300


def base(place: Path, *, tied: bool = False, rows: int | None = None) -> Path:
    """A model with a tokenizer; its table has as many rows as that has tokens, or `rows`."""
    tokenizer = train_tokenizer([TEXT.replace("<", " ").replace(">", " ")] * 3, ROWS)
    tokenizer.save_pretrained(place)
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {k: v for k, v in LLAMA.items() if k != "model_type"}
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**values, **ids, vocab_size=rows or len(tokenizer), tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def config_of(model: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    own = {"init_model": None, "train_tokenizer_vocab_size": None, "model_name_or_path": str(model)}
    return settings(text, tmp_path / "run", **(own | {"new_tokens": NEW, "max_steps": 4} | changes))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_run_grows_tokenizer_and_embeddings(
    tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = base(tmp_path / "m", tied=tied)
    size = len(load_tokenizer(str(place)))
    config = config_of(place, tmp_path)
    train(config)
    assert "new embeddings" not in capfd.readouterr().err
    folder = tmp_path / "run" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == size + 3 == model.config.vocab_size
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape
    assert model.get_input_embeddings().weight.shape[0] == size + 3
    ids = tokenizer(TEXT).input_ids
    assert [ids.count(size + i) for i in range(3)] == [1, 1, 1], "each is one token"
    assert "<think>" not in tokenizer.decode(ids, skip_special_tokens=True), "they are special"
    saved = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in saved) != tied
    # A resumed run ends with the same bits.
    source = str(tmp_path / "run" / "checkpoint-2")
    train(config.replace(output_dir=str(tmp_path / "b"), resume_from_checkpoint=source))
    one, two = (tensors_of(tmp_path / run / "checkpoint-4") for run in ("run", "b"))
    assert one == two
    export_checkpoint(tmp_path / "run", tmp_path / "exported", Form())
    assert load_tokenizer(str(tmp_path / "exported")).get_added_vocab().keys() >= set(NEW)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == size + 3
    # The trained model has the tokens now: the same settings change nothing more.
    again = config.replace(model_name_or_path=str(folder), output_dir=str(tmp_path / "c"), max_steps=1)
    train(again)
    assert json.loads((tmp_path / "c" / "model" / "config.json").read_text())["vocab_size"] == size + 3
    found = evaluate_model(again)
    assert 0 < found["eval_loss"] < 100
    with pytest.raises(ConfigError, match="new_tokens was"):
        train(config.replace(new_tokens=["<other>"], resume_from_checkpoint="latest"))


def test_new_rows_are_drawn_as_transformers_draws_them(tmp_path: Path) -> None:
    place = base(tmp_path / "m")
    config = config_of(place, tmp_path, learning_rate=0.0)
    tokenizer = load_training_data(config).tokenizer
    found = dict(build_model(config, tokenizer).named_parameters())
    reference = AutoModelForCausalLM.from_pretrained(place)
    torch.manual_seed(config.seed)
    reference.resize_token_embeddings(len(tokenizer))
    for name, value in reference.named_parameters():
        assert torch.equal(found[name], value), name
    other = dict(build_model(config.replace(seed=1), tokenizer).named_parameters())
    new = slice(len(tokenizer) - 3, None)
    name = "model.embed_tokens.weight"
    assert not torch.equal(other[name][new], found[name][new])
    # Around the mean of the old rows: far closer to it than an old row is.
    mean = found[name][: -len(NEW)].mean(0)
    assert (found[name][new] - mean).norm(dim=1).max() < 0.1 * (found[name][:100] - mean).norm(dim=1).min()


def test_a_padded_table_is_neither_grown_nor_shrunk(tmp_path: Path) -> None:
    place = base(tmp_path / "m", rows=320)
    train(config_of(place, tmp_path, max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == 320 == model.lm_head.weight.shape[0]
    grow_vocabulary(model, 10, 0)
    assert model.config.vocab_size == 320


def test_tokens_without_a_row_are_refused_by_name(tmp_path: Path) -> None:
    """A tokenizer that has more tokens than the model has rows."""
    place = base(tmp_path / "m")
    tokenizer = load_tokenizer(str(place))
    size = len(tokenizer)
    add_new_tokens(tokenizer, NEW)
    tokenizer.save_pretrained(place)
    generator = Generator.load(place, device="cpu")
    assert generator.complete("the store", Sampling(max_new_tokens=1, temperature=0)) is not None
    with pytest.raises(
        DataError, match=rf"token {size} \('<think>'\), and the model's embeddings have {size} rows"
    ):
        generator.complete("the <think>", Sampling(max_new_tokens=1))
    with pytest.raises(DataError, match="outside the model's vocabulary") as caught:
        train(config_of(place, tmp_path, new_tokens=[], max_steps=1))
    assert "new_tokens" in str(caught.value.hint)
    train(config_of(place, tmp_path, max_steps=1))  # named, they get their rows


def test_the_tokens_are_part_of_the_cache_key(tmp_path: Path) -> None:
    config = config_of(base(tmp_path / "m"), tmp_path, dataset_cache_dir=str(tmp_path / "cache"))
    without = config.replace(new_tokens=[])
    counts = [load_training_data(c) for c in (without, config, config, without)]
    assert [data.was_cached for data in counts] == [False, False, True, True]
    highest = [int(data.store.ids.max()) for data in counts]
    assert highest[0] == highest[3] < highest[1] == highest[2] == len(counts[1].tokenizer) - 1


def test_the_planner_knows_the_size(tmp_path: Path) -> None:
    place = base(tmp_path / "m")
    config = config_of(place, tmp_path)
    one, two = (plan_run(c).planner.outline for c in (config.replace(new_tokens=[]), config))
    assert two.vocabulary == one.vocabulary + 3
    assert two.num_parameters == one.num_parameters + 2 * 3 * 32


def test_with_a_tokenizer_that_is_trained(tmp_path: Path) -> None:
    changes = {"init_model": LLAMA, "train_tokenizer_vocab_size": 280, "model_name_or_path": None}
    config = config_of(tmp_path, tmp_path, **changes, max_steps=1)
    assert plan_run(config).planner.outline.vocabulary == 283
    train(config)
    values = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert values["vocab_size"] == len(tokenizer)
    assert set(NEW) <= tokenizer.get_added_vocab().keys()


def test_tokens_that_are_there_keep_their_numbers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], ROWS)
    size = len(tokenizer)
    add_new_tokens(tokenizer, NEW[:2])
    add_new_tokens(tokenizer, NEW)
    assert len(tokenizer) == size + 3
    assert tokenizer.convert_tokens_to_ids(NEW) == [size, size + 1, size + 2]
    assert set(NEW) <= set(tokenizer.all_special_tokens), "what was added before stays special"
    for tokens in ([""], ["<a>", "<a>"]):
        with pytest.raises(ConfigError, match="different texts"):
            TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "d", "new_tokens": tokens})
