"""Names that other trainers use for a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from config_files import BASE, write
from horizon_lm.config import DatasetConfig, TrainConfig, load_config
from horizon_lm.config.adapter_names import JOINED
from horizon_lm.config.aliases import ALIASES, DROPPED, UNAVAILABLE
from horizon_lm.errors import ConfigError

ADAPTER_KEYS = ("lora_r", "use_rslora", "target_modules", "modules_to_save", "base_dtype")
ALIAS_VALUES: dict[str, tuple[Any, Any]] = {
    "unfrozen_parameters": (["lm_head", "model.norm"], ["^(?:lm_head)", "^(?:model.norm)"]),
    "trainable_parameters": (["model.norm"], [r"^model\.norm"]),
    "trainable_parameters_regex": ("norm, lm_head", ["norm", "lm_head"]),
    "finetuning_type": ("lora", "lora"),
    "use_peft": (True, "lora"),
    "use_dora": (True, "dora"),
    "peft_use_dora": (True, "dora"),
    "peft_use_rslora": (True, True),
    "lora_target": ("q_proj,v_proj", ["q_proj", "v_proj"]),
    "lora_target_modules": (r".*\.q_proj", r".*\.q_proj"),
    "lora_target_linear": (True, "all-linear"),
    "lora_modules_to_save": (["lm_head"], ["lm_head"]),
    "additional_target": ("lm_head,norm", ["lm_head", "norm"]),
    "load_in_4bit": (True, "nf4"),
    "load_in_8bit": (True, "int8"),
    "quantization_bit": (4, "nf4"),
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
    if key in ADAPTER_KEYS:
        rest["adapter"] = "lora"
    config = TrainConfig.from_dict({**rest, alias: given_value})
    assert getattr(config, key) == expected
    assert alias not in config.to_yaml().replace(key, "").split(":")[0]
    if key in JOINED:  # which two keys of another trainer may set together
        assert getattr(TrainConfig.from_dict({**rest, key: expected, alias: given_value}), key) == expected
        return
    with pytest.raises(ConfigError, match=f"'{key}' and '{alias}' are the same setting"):
        TrainConfig.from_dict({**rest, key: expected, alias: given_value})


def test_each_alias_is_reported_once(tmp_path: Path) -> None:
    text = "model: folder\ndatasets: a.txt\nlr: 1e-4\ngradient_checkpointing_kwargs: null\nlora_rank: 16\n"
    path = write(tmp_path, text)
    config, notes = load_config(path, ["num-epochs=2", "num_epochs=3"])
    assert config.learning_rate == 1e-4 and config.num_train_epochs == 3
    assert notes == [
        f"{path}:1: 'model' is read as 'model_name_or_path'",
        f"{path}:3: 'lr' is read as 'learning_rate'",
        f"{path}:4: 'gradient_checkpointing_kwargs' is ignored, {DROPPED['gradient_checkpointing_kwargs']}",
        f"{path}:5: 'lora_rank' is read as 'lora_r'{ALIASES['lora_rank'].remark}",
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


# Adapters as other trainers write them -> our settings.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "axolotl": (
        {
            **{
                "adapter": "lora",
                "lora_r": 32,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "lora_model_dir": None,
            },
            **{"lora_target_modules": ["q_proj"], "lora_target_linear": True, "load_in_8bit": False},
            **{"lora_fan_in_fan_out": None, "lora_modules_to_save": ["lm_head"], "peft_use_dora": False},
        },
        {"adapter": "lora", "lora_r": 32, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    ),
    "axolotl's qlora": (
        {"adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_target_linear": True},
        {"adapter": "lora", "base_dtype": "nf4", "lora_r": 8},
    ),
    "qlora alone": ({"adapter": "qlora"}, {"adapter": "lora", "base_dtype": "nf4"}),
    "qlora, and not int8": (
        {"adapter": "qlora", "load_in_8bit": False},
        {"adapter": "lora", "base_dtype": "nf4"},
    ),
    "axolotl's empty adapter": ({"adapter": None}, {"adapter": "none", "base_dtype": "auto"}),
    "axolotl's dora": ({"adapter": "lora", "peft_use_dora": True}, {"adapter": "dora"}),
    "llama-factory": (
        {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "quantization_bit": 4},
        {"adapter": "lora", "lora_r": 8, "target_modules": "all-linear", "base_dtype": "nf4"},
    ),
    "llama-factory's names": (
        {
            "finetuning_type": "lora",
            "use_dora": True,
            "lora_target": "q_proj,v_proj",
            "quantization_bit": None,
        },
        {"adapter": "dora", "target_modules": ["q_proj", "v_proj"], "base_dtype": "auto"},
    ),
    "llama-factory's full": ({"finetuning_type": "full"}, {"adapter": "none"}),
    "trl": (
        {
            **{"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "use_rslora": True},
            **{"lora_task_type": "CAUSAL_LM", "use_dora": False, "load_in_4bit": False},
            **{"lora_target_modules": ["all-linear"], "lora_modules_to_save": None},
        },
        {"adapter": "lora", "lora_alpha": 32, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "trl without": ({"use_peft": False, "use_dora": False, "load_in_8bit": False}, {"adapter": "none"}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_of_other_trainers(case: str, tmp_path: Path) -> None:
    theirs, ours = ADAPTERS[case]
    base = {key: value for key, value in BASE.items() if key != "init_model"} | {"model_name_or_path": "m"}
    config = TrainConfig.from_dict({**base, **theirs})
    assert {key: getattr(config, key) for key in ours} == ours
    path = write(tmp_path, yaml.safe_dump({**base, **theirs}))
    found, notes = load_config(path)
    assert {key: getattr(found, key) for key in ours} == ours
    assert (
        TrainConfig.from_dict(yaml.safe_load(found.to_yaml())) == found
    )  # ours alone, and they say the same
    renamed = set(theirs) - set(TrainConfig.model_fields)
    for key in renamed:
        if theirs[key] is not None:
            assert sum(f"'{key}' is" in note for note in notes) == 1, (key, notes)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"finetuning_type": "freeze"}, r"train: \[patterns\]"),
        ({"finetuning_type": "oft"}, "PeftModel"),
        ({"quantization_bit": 3}, "expected 4 or 8"),
        ({"use_peft": "yes"}, "expected true or false"),
        ({"adapter": "lora", "use_peft": False}, "'adapter' and 'use_peft' are the same setting"),
        ({"adapter": "lora", "load_in_4bit": True, "load_in_8bit": True}, "are the same setting"),
        ({"adapter": "qlora", "load_in_8bit": True, "base_dtype": "nf4"}, "are the same setting"),
        ({"lora_rank": 8, "lora_r": 8, "adapter": "lora"}, "are the same setting"),
        ({"adapter": "llama-adapter"}, "adapter"),
        ({"unfrozen_parameters": ["^model.embed_tokens.weight$[:32000]"]}, r"\[a:b\]"),
    ],
)
def test_adapters_that_mean_nothing_here(theirs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict({**BASE, **theirs})


def test_adapters_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model_name_or_path: m\ndatasets: a.txt\nadapter: lora\nlora_r: 4\n")
    assert load_config(path, ["use_dora=true"])[0].adapter == "dora"
    assert load_config(path, ["use_dora=false"])[0].adapter == "lora"
    assert load_config(path, ["adapter=lora", "use_dora=true"])[0].adapter == "dora"
    found = load_config(path, ["adapter=qlora", "lora_rank=8"])[0]
    assert (found.adapter, found.base_dtype, found.lora_r) == ("lora", "nf4", 8)
    assert load_config(path, ["load_in_8bit=true"])[0].base_dtype == "int8"
    for wrong in (["adapter=lora", "use_peft=false"], ["load_in_4bit=true", "load_in_8bit=true"]):
        with pytest.raises(ConfigError, match="are the same setting"):
            load_config(path, wrong)


@pytest.mark.parametrize(
    ("lines", "override", "key", "meant"),
    [
        ("use_dora: true", "use_dora=false", "adapter", "lora"),
        ("peft_use_dora: true", "peft_use_dora=false", "adapter", "lora"),
        ("load_in_4bit: true", "load_in_4bit=false", "base_dtype", "auto"),
        ("load_in_8bit: true", "load_in_8bit=false", "base_dtype", "auto"),
        ("quantization_bit: 4", "quantization_bit=null", "base_dtype", "auto"),
        ("load_in_8bit: true", "load_in_4bit=false", "base_dtype", "int8"),
    ],
)
def test_the_command_line_switches_off_what_a_file_switched_on(
    lines: str, override: str, key: str, meant: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"model_name_or_path: m\ndatasets: a.txt\nadapter: lora\n{lines}\n")
    config, notes = load_config(path, [override])
    assert getattr(config, key) == meant
    name = override.partition("=")[0]
    is_said = f"command line: '{name}' is off, so {key} is {meant}" in notes
    assert is_said == (meant != "int8"), notes
