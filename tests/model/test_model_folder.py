"""What the configuration of a model folder may choose and say."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from horizon_lm import cli, train
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import HorizonError
from horizon_lm.model import configuration
from horizon_lm.model.loading import create_model, load_model
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.training.generate import Generator, Sampling
from model_on_disk import model as model
from small_runs import LLAMA, settings, write_text


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    configuration._said.clear()
    with caplog.at_level(logging.WARNING, logger="horizon_lm"):
        yield caplog


@pytest.fixture
def changed(model: Path) -> Iterator[Any]:
    """Changes the folder's config.json for the length of a test."""
    path = model / "config.json"
    was = path.read_text()

    def change(text: str | None = None, **more: Any) -> Path:
        path.write_text(text if text is not None else json.dumps({**json.loads(was), **more}))
        return model

    yield change
    path.write_text(was)


def load(folder: Path, attention: str = "sdpa") -> Any:
    return load_model(folder, trust_remote_code=False, revision=None, attn_implementation=attention)


KERNEL = "kernels-community/flash-attn"


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    ("user", "folders"),
    [
        ("eager", "sdpa"),
        ("sdpa", "eager"),
        ("sdpa", KERNEL),
        ("sdpa", "flash_attention_2"),
        ("eager", {"": KERNEL}),
    ],
)
def test_the_users_attention_wins(
    changed: Any, said: pytest.LogCaptureFixture, key: str, user: str, folders: Any
) -> None:
    folder = changed(**{key: folders, "_experts_implementation": "eager", "vision_config": {key: folders}})
    loaded = load(folder, user)
    assert loaded.config._attn_implementation == user
    assert not configuration.CHOOSES_CODE & loaded.config.to_dict().keys()
    config = TrainConfig.from_dict(
        {
            "model_name_or_path": str(folder),
            "datasets": "t.txt",
            "output_dir": "r",
            "attn_implementation": user,
        }
    )
    planned = model_config(config)
    assert planned._attn_implementation == user
    assert Outline(planned, ModelSettings(attn_implementation=user)).num_layers == 2
    found = [line for line in said.messages if "which is ignored" in line]
    assert any(
        str(KERNEL if isinstance(folders, dict) else folders) in line and user in line for line in found
    )
    assert len(found) == len(set(found))


def test_without_our_care_the_folder_chooses(changed: Any) -> None:
    """The control: transformers lets a folder override what is asked for."""
    folder = changed(_attn_implementation="sdpa")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.config._attn_implementation == "sdpa"


def test_generate_takes_no_kernel_of_a_folder(changed: Any, said: pytest.LogCaptureFixture) -> None:
    folder = changed(_attn_implementation=KERNEL)
    generator = Generator.load(folder, device="cpu")
    assert generator._model.config._attn_implementation == "sdpa"
    generator.complete("the", Sampling(max_new_tokens=2))
    assert len(said.messages) == 1


def test_parts_of_a_model_and_init_model_choose_no_code_either(said: pytest.LogCaptureFixture) -> None:
    inner = {k: v for k, v in LLAMA.items() if k != "model_type"}
    nested = {
        "model_type": "mistral3",
        "text_config": {**inner, "model_type": "mistral", "_attn_implementation": KERNEL},
        "vision_config": {"model_type": "pixtral", "attn_implementation": KERNEL, "use_kernels": True},
    }
    config = configuration.configuration_of(nested, "eager")
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    assert "kernel" not in config.to_json_string()
    made = create_model(
        {**LLAMA, "vocab_size": 40, "_attn_implementation": KERNEL},
        dtype=torch.float32,
        seed=0,
        attn_implementation="eager",
    )
    assert made.config._attn_implementation == "eager"


def test_an_export_names_no_kernel(
    changed: Any, tmp_path: Path, said: pytest.LogCaptureFixture, no_samples: None
) -> None:
    folder = changed(_attn_implementation=KERNEL, attn_implementation=KERNEL, experts_implementation="evil")
    given = settings(write_text(tmp_path / "t.txt"), tmp_path / "run", max_steps=1)
    trained = given.replace(init_model=None, train_tokenizer_vocab_size=None, model_name_or_path=str(folder))
    train(trained)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert cli.main(["eval", str(tmp_path / "run" / "model"), f"datasets={tmp_path / 't.txt'}"]) == 0
    for place in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-1", tmp_path / "out"):
        text = (place / "config.json").read_text()
        assert "kernels-community" not in text and "implementation" not in text


ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**30},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": None},
    {"num_hidden_layers": [2]},
    {"hidden_size": 10**9},
    {"hidden_size": 10**12},
    {"hidden_size": 0},
    {"hidden_size": 17},
    {"vocab_size": 10**12},
    {"vocab_size": 10**9},
    {"vocab_size": -5},
    {"intermediate_size": 10**9},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 10**9},
    {"head_dim": -8},
    {"max_position_embeddings": 10**12},
    {"max_position_embeddings": "x"},
    {"num_labels": 10**9},
    {"layer_types": ["full_attention"] * 5},
    {"layer_types": "x"},
    {"rms_norm_eps": "x"},
    {"hidden_act": "evil"},
    {"model_type": 5},
    {"model_type": ["llama"]},
    {"model_type": "evil"},
    {"transformers_weights": "../other.safetensors"},
    {"quantization_config": {"quant_method": "evil"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"vision_config": {"num_hidden_layers": 10**9}},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_configurations_are_refused_at_once(changed: Any, change: dict[str, Any]) -> None:
    folder = changed(**change)
    started = time.process_time()
    with pytest.raises(HorizonError) as caught:
        load(folder)
    assert caught.value.exit_code in (2, 4) and time.process_time() - started < 10
    assert len(caught.value.message) < 900 and "bug" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model_type": "llama", "x": ' + "[" * 500 + "]" * 500 + "}", "[]", "{", "5"]
)
def test_what_is_no_configuration_is_refused(changed: Any, text: str) -> None:
    folder = changed(text)
    with pytest.raises(HorizonError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) <= 2


def test_commands_refuse_an_absurd_configuration_in_one_line(
    changed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(num_hidden_layers=10**9)
    text = write_text(tmp_path / "t.txt")
    common = [f"datasets={text}", "device=cpu", f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    for arguments in (
        ["plan", f"model_name_or_path={folder}", *common],
        ["train", f"model_name_or_path={folder}", *common],
        ["eval", str(folder), f"datasets={text}", "device=cpu"],
        ["generate", str(folder), "--prompt", "x"],
        ["train", "init_model={model_type: llama, num_hidden_layers: 1000000000}", *common],
    ):
        assert cli.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert any("num_hidden_layers is 1,000,000,000, expected at most" in line for line in lines)
    assert not (tmp_path / "run").exists()
