"""Names that other trainers use for a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config_files import BASE, write
from horizon_lm.config import DatasetConfig, TrainConfig, load_config
from horizon_lm.config.aliases import ALIASES, DROPPED, UNAVAILABLE
from horizon_lm.errors import ConfigError

ALIAS_VALUES: dict[str, tuple[Any, Any]] = {
    "unfrozen_parameters": (["lm_head", "model.norm"], ["^(?!(?:lm_head)|(?:model.norm))"]),
    "freeze_parameters": (["model.embed"], [r"^model\.embed"]),
    "freeze_parameters_regex": ("experts", ["experts"]),
    "tokens": (["<a>"], ["<a>"]),
    "add_tokens": ("<a>, <b>", ["<a>", "<b>"]),
    "new_special_tokens": ("<a>,<b>", ["<a>", "<b>"]),
    "add_special_tokens": (None, []),
    "max_checkpoints": (3, 3),
    "max_train_samples": (7, 7),
    "bf16": (True, "bfloat16"),
    "pure_bf16": (True, "bfloat16"),
    "fp32": (True, "float32"),
    "optimizer": ("lion", "lion"),
    "gradient_checkpointing": (False, "keep"),
    "activation_checkpointing": (True, "recompute"),
    "torch_dtype": ("torch.float32", "float32"),
    "full_determinism": (True, True),
    "attn_impl": ("eager", "eager"),
    "torch_compile": (True, True),
    "use_liger_kernel": (True, "liger"),
    "enable_liger_kernel": (False, "none"),
    "flash_attn": ("fa2", "flash_attention_2"),
    "flash_attention": (False, "sdpa"),
    "sample_packing": (True, True),
    "packed": (True, True),
    "warmup_ratio": (0.25, 0.25),
    "lr_scheduler": ("linear", "linear"),
    "dataset": ("a.txt", [DatasetConfig(path="a.txt")]),
    "dataset_name": ("a.txt", [DatasetConfig(path="a.txt")]),
    "train_file": (["a.txt"], [DatasetConfig(path="a.txt")]),
    "evaluation_strategy": ("no", "no"),
    "assistant_only_loss": (True, "assistant"),
    "completion_only_loss": (False, "all"),
    "train_on_inputs": (False, "auto"),
    "train_on_prompt": (True, "all"),
    "mask_history": (True, "last_assistant"),
    "neat_packing": (True, "bfd"),
    **{name: ("me/model", "me/model") for name in ("push_to_hub_model_id", "export_hub_model_id")},
    **{
        name: ("a.txt", [DatasetConfig(path="a.txt")])
        for name in ("dataset_path", "eval_dataset", "test_datasets", "val_dataset", "validation_file")
    },
    "stage": ("dpo", "dpo"),
    "rl": ("kto", "kto"),
    "pref_loss": ("hinge", ["hinge"]),
    "dpo_loss_type": (["sigmoid", "sft"], ["sigmoid", "sft"]),
    "dpo_loss_weights": ([1.0, 0.5], [1.0, 0.5]),
    "dpo_use_weighting": (True, True),
    "dpo_label_smoothing": (0.1, 0.1),
    "pref_ftx": (0.0, None),
    "truncation_mode": ("keep_end", "keep_end"),
    **{name: (7, 7) for name in ("eval_batch_size", "preprocessing_num_workers", "dataset_processes")},
}


@pytest.mark.parametrize(
    ("lines", "key", "meant"),
    [
        ("train_on_prompt: false\nmask_history: true", "loss_on", "last_assistant"),
        ("mask_history: true\ntrain_on_prompt: false", "loss_on", "last_assistant"),
        ("assistant_only_loss: false\ncompletion_only_loss: true", "loss_on", "completion"),
        ("train_on_prompt: false\nmask_history: false", "loss_on", "auto"),
        ("bf16: true\nfp32: false", "dtype", "bfloat16"),
    ],
)
def test_of_two_switches_the_one_that_is_off_yields(lines: str, key: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"init_model: {{model_type: llama}}\ndatasets: a.txt\n{lines}\n")
    config, notes = load_config(tmp_path / "run.yaml")
    assert getattr(config, key) == meant and len(notes) == 2


@pytest.mark.parametrize(
    "lines",
    [
        "train_on_prompt: true\nmask_history: true",
        "bf16: true\nfp32: true",
        "mask_history: false\nloss_on: all",  # beside the key itself nothing yields
        "batch_size: 2\nmicro_batch_size: 2",
    ],
)
def test_two_names_that_both_say_something_are_refused(lines: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"init_model: {{model_type: llama}}\ndatasets: a.txt\n{lines}\n")
    with pytest.raises(ConfigError, match="are the same setting"):
        load_config(tmp_path / "run.yaml")


def test_tokens_per_step_on_the_command_line_stands_in_place_of_the_files_cut(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    cut = "per_device_train_batch_size: 8\ngradient_accumulation_steps: 32\n"
    file.write_text("init_model: {model_type: llama}\ndatasets: a.txt\n" + cut)
    config, notes = load_config(file, ["tokens_per_step=4096"])
    named = config.model_fields_set
    assert config.tokens_per_step == 4096 and "tokens_per_step" in named
    assert not named & {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert sum("stands in place of" in note for note in notes) == 2
    pinned, _ = load_config(file, ["tokens_per_step=4096", "batch_size=2"])  # what is said beside it stays
    assert pinned.per_device_train_batch_size == 2
    assert "per_device_train_batch_size" in pinned.model_fields_set
    kept, _ = load_config(file, ["tokens_per_step=null"])
    assert kept.gradient_accumulation_steps == 32


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_read_as_its_setting(alias: str) -> None:
    key = ALIASES[alias].key
    kind = TrainConfig.model_fields[key].annotation
    given_value, expected = ALIAS_VALUES.get(
        alias, (7, 7) if kind in (int, float, int | float, float | None) else ("a", "a")
    )
    rest = {name: value for name, value in BASE.items() if name != key}
    config = TrainConfig.from_dict({**rest, alias: given_value})
    assert getattr(config, key) == expected
    assert alias not in config.to_yaml().replace(key, "").split(":")[0]
    with pytest.raises(ConfigError, match=f"'{key}' and '{alias}' are the same setting"):
        TrainConfig.from_dict({**rest, key: expected, alias: given_value})


def test_each_alias_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, "model: folder\ndatasets: a.txt\nlr: 1e-4\ngradient_checkpointing_kwargs: null\n")
    config, notes = load_config(path, ["num-epochs=2", "num_epochs=3"])
    assert config.learning_rate == 1e-4 and config.num_train_epochs == 3
    assert notes == [
        f"{path}:1: 'model' is read as 'model_name_or_path'",
        f"{path}:3: 'lr' is read as 'learning_rate'",
        f"{path}:4: 'gradient_checkpointing_kwargs' is ignored, {DROPPED['gradient_checkpointing_kwargs']}",
        "command line: 'num_epochs' is read as 'num_train_epochs'",
    ]


def test_aliases_refuse_what_they_cannot_mean() -> None:
    assert TrainConfig.from_dict({**BASE, "bf16": False}).dtype == "float32"
    for alias, value in {
        "warmup_ratio": 5,
        "bf16": "maybe",
        "fp32": 1,
        "flash_attn": [1],
        "torch_dtype": {},
        "train_on_inputs": 1,
        "assistant_only_loss": "yes",
        "neat_packing": "bfd",
    }.items():
        with pytest.raises(ConfigError):
            TrainConfig.from_dict({**BASE, alias: value})
    for key in UNAVAILABLE:
        with pytest.raises(ConfigError, match=f"unknown key '{key}'\n  hint: .*leave the key out"):
            TrainConfig.from_dict({**BASE, key: "x"})
    assert not set(ALIASES) & set(TrainConfig.model_fields)
    assert {alias.key for alias in ALIASES.values()} <= set(TrainConfig.model_fields)
