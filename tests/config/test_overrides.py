"""Settings on the command line win over those of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from config_files import GOOD, write
from horizon_lm.config import TrainConfig, load_config
from horizon_lm.errors import ConfigError


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path, "init_model: {model_type: llama, hidden_size: 8}\ndatasets: d\nlr: 1\nrun_name: x\n"
    )
    overrides = [
        "init-model.hidden-size=256",
        "--init_model.rope.theta=1e4",
        "--learning-rate=2e-5",
        "seed=1",
    ]
    overrides += [
        "run_name=",
        "sample_prompt=def f(x): # y",
        "datasets=a: b.jsonl",
        "max_grad_norm=null",
        "seed=3",
    ]
    config = TrainConfig.from_yaml(path, overrides)
    assert config.init_model == {"model_type": "llama", "hidden_size": 256, "rope": {"theta": 1e4}}
    assert (config.learning_rate, config.seed, config.run_name, config.max_grad_norm) == (2e-5, 3, None, None)
    assert config.sample_prompt == "def f(x): # y" and config.datasets[0].path == "a: b.jsonl"
    several = load_config(
        None, ["model=5", "datasets=[a.txt, {path: b, text_column: c}]", "run_name='null'"]
    )[0]
    assert [entry.text_column for entry in several.datasets] == ["text", "c"]
    assert several.model_name_or_path == "5" and several.run_name == "null"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learnig_rate=1", "command line: unknown key 'learnig_rate'"),
        ("learning_rate=fast", "command line: learning_rate is fast, expected a number >= 0"),
        ("learning_rate=[1", "command line: learning_rate=[1: expected ',' or ']'"),
        ("learning_rate", "command line: 'learning_rate' is not of the form key=value"),
        ("=3", "command line: '=3' is not of the form key=value"),
        ("datasets.path=x", "command line: 'datasets.path=x': datasets is not a mapping"),
        ("seed.x=1", 'command line: seed is {"x": 1}, expected a whole number >= 0'),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD), [override])
    assert caught.value.message.startswith(message)


def test_two_names_of_one_setting_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lr' and 'learning_rate' are the same setting"):
        load_config(write(tmp_path, GOOD), ["lr=1", "learning_rate=1"])
