"""The shape of errors in a configuration: one line for each, with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from config_files import GOOD, message_of, write
from horizon_lm.config import load_config


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("learnig_rate: 1", "run.yaml:3: unknown key 'learnig_rate'", "did you mean 'learning_rate'?"),
        ("cutof_len: 1", "run.yaml:3: unknown key 'cutof_len'", "did you mean 'max_length'?"),
        ("zzz: 1", "run.yaml:3: unknown key 'zzz'", "'horizon train --help' lists every setting"),
        (
            "slots: many",
            "run.yaml:3: slots is many, expected a whole number >= 2",
            "leave it out for the default, 2",
        ),
        ("slots: 4.0", "run.yaml:3: slots is 4.0, expected a whole number >= 2", "write 4"),
        ("dtype: bf16", "run.yaml:3: dtype is bf16, expected bfloat16 | float32", "did you mean 'bfloat16'?"),
        (
            "learning_rate: '1e-5'",
            "run.yaml:3: learning_rate is 1e-5, expected a number >= 0",
            "write the number without quotes",
        ),
        (
            "learning_rate: '1e-5x'",
            "run.yaml:3: learning_rate is 1e-5x, expected a number >= 0",
            "leave it out for the default, 1e-05",
        ),
        ("plot_loss: yes", "run.yaml:3: plot_loss is yes, expected true or false", "write true"),
        (
            "run_name: 5",
            "run.yaml:3: run_name is 5, expected text or null",
            "put it in quotes to make it text",
        ),
        (
            "warmup_steps: 1.5",
            "run.yaml:3: warmup_steps is 1.5, expected a whole number >= 0, or a share of all steps below 1",
            "leave it out for the default, 0.03",
        ),
        (
            "resident: layer 0",
            "run.yaml:3: resident is layer 0, expected a whole number >= 0, auto, trainable, or a "
            "list of units such as [head, layer 0]",
            'resident=["layer 0"]',
        ),
        (
            "resident: embedding, head",
            "run.yaml:3: resident is embedding, head, expected a whole number >= 0, auto, trainable, or a "
            "list of units such as [head, layer 0]",
            'resident=["embedding", "head"]',
        ),
        (
            "freeze: 'layers\\.[0-9]{1,2}'",
            "run.yaml:3: freeze is layers\\.[0-9]{1,2}, expected a list of regular expressions",
            "leave it out for the default, []",
        ),
        (
            "init_model:\n  model_type: llama",
            "run.yaml:1: 'model_name_or_path' and 'init_model' are both given",
            "keep one of them, or set the other to null",
        ),
        (
            "train_tokenizer_vocab_size: 4096",
            "run.yaml:3: train_tokenizer_vocab_size needs init_model",
            "leave it out: an existing model keeps its own tokenizer",
        ),
        (
            "lr_scheduler_type: cosine_with_min_lr",
            "run.yaml:3: cosine_with_min_lr needs either min_lr or min_lr_rate",
            "for example lr_scheduler_kwargs.min_lr_rate=0.1",
        ),
        (
            "lr_scheduler_kwargs: {min_lr: 1}",
            "run.yaml:3: lr_scheduler_kwargs: cosine has no argument 'min_lr'",
            "cosine takes num_cycles",
        ),
    ],
)
def test_a_fault_is_one_line_and_a_hint(line: str, message: str, hint: str, tmp_path: Path) -> None:
    assert message_of(GOOD + line + "\n", tmp_path) == (message, hint)


def test_faults_inside_datasets_name_the_entry(tmp_path: Path) -> None:
    content = "model_name_or_path: m\ndatasets:\n  - a.txt\n  - path: b\n    formt: text\n"
    assert message_of(content, tmp_path) == (
        "run.yaml:5: unknown key 'datasets[1].formt'",
        "did you mean 'format'?",
    )
    content = "model_name_or_path: m\ndatasets:\n  - a.txt\n  - 5\n"
    assert message_of(content, tmp_path)[0].startswith("run.yaml:4: datasets[1] is 5, expected a path")


def test_several_faults_are_one_line_each_in_the_order_of_the_file(tmp_path: Path) -> None:
    message, hint = message_of(GOOD + "lerning_rate: 1\nslots: 1\n", tmp_path)
    assert message.splitlines() == [
        "run.yaml:3: unknown key 'lerning_rate' (did you mean 'learning_rate'?)",
        "run.yaml:4: slots is 1, expected a whole number >= 2",
    ]
    assert hint == "'horizon train --help' lists every setting"
    message, _ = message_of(GOOD + "".join(f"q{i}: 1\n" for i in range(59)), tmp_path)
    assert len(message.splitlines()) == 51 and message.endswith("and 9 more")


def test_all_faults_of_a_file_are_shown_whatever_finds_them(tmp_path: Path) -> None:
    """Aliases, types, unknown keys, and after those are mended every pair that does not go together."""
    message, _ = message_of(
        GOOD
        + "warmup_ratio: 7\nlearning_rate: fast\nepochs: -1\nzzz: 1\nslots: 1\nlr: 1\ntrain_on_inputs: 3\n",
        tmp_path,
    )
    assert [line.split(":")[1] for line in message.splitlines()] == ["3", "4", "5", "6", "7", "8", "9"]
    message, _ = message_of(
        GOOD + "val_size: 0.1\neval_datasets: e\nupdate: eager\nstreaming: true\n"
        'lr_scheduler_type: cosine_with_min_lr\nloss_spike: rollback\nsave_strategy: "no"\n',
        tmp_path,
    )
    for part in (
        "'val_size' and 'eval_datasets' are both given",
        "update: eager updates layers before all gradients are known",
        "streaming needs max_steps",
        "val_size is not supported with streaming",
        "cosine_with_min_lr needs either min_lr or min_lr_rate",
        "rollback needs checkpoints, but save_strategy is no",
    ):
        assert message.count(part) == 1, (part, message)
    assert len(message.splitlines()) == 6


def test_an_alias_with_a_fault_does_not_hide_that_a_key_is_there(tmp_path: Path) -> None:
    message, _ = message_of("model: m\ndatasets: d\nmodel_name: n\n", tmp_path)
    assert message == "run.yaml:3: 'model' and 'model_name' are the same setting"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model_types", None),  # moment_dtype is as near as 0.6, and something else
        ("warmup", "warmup_steps"),
        ("lr_schedule", "lr_scheduler_type"),
        ("bacth_size", "per_device_train_batch_size"),
        ("max_len", "max_length"),
        ("dataset_foo", None),
        ("mode", "model_name_or_path"),
    ],
)
def test_a_name_is_suggested_only_where_it_is_near(key: str, hint: str | None, tmp_path: Path) -> None:
    _, found = message_of(GOOD + f"{key}: 1\n", tmp_path)
    expected = f"did you mean '{hint}'?" if hint else "'horizon train --help' lists every setting"
    assert found == expected


AXOLOTL = """base_model: m
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
strict: false
datasets:
  - path: a.jsonl
    type: chat_template
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/out
sequence_len: 512
sample_packing: true
adapter:
wandb_project:
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
warmup_steps: 10
save_steps:
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
"""


def test_a_file_of_axolotl_with_keys_left_empty_is_read(tmp_path: Path) -> None:
    config, notes = load_config(write(tmp_path, AXOLOTL))
    assert config.model_name_or_path == "m" and config.learning_rate == 2e-4
    assert config.dataset_cache_dir == "auto"  # not null, which would keep no tokens
    assert config.save_steps == 500 and config.project == "horizon-lm"
    (empty,) = [note for note in notes if "without a value" in note]
    assert "wandb_entity" in empty and "save_steps" in empty and "resume_from_checkpoint" not in empty
    ignored = [note for note in notes if "is ignored" in note]
    assert sum("'model_type'" in note or "'tokenizer_type'" in note for note in ignored) == 2
    assert any("'load_in_8bit' is ignored, it is off" in note for note in ignored)


def test_what_is_switched_on_elsewhere_and_missing_here_is_still_refused(tmp_path: Path) -> None:
    message, hint = message_of(AXOLOTL.replace("strict: false", "relora: true"), tmp_path)
    assert message == "run.yaml:5: unknown key 'relora'" and "leave the key out" in str(hint)
    message, hint = message_of(AXOLOTL.replace("load_in_8bit: false", "load_in_8bit: true"), tmp_path)
    assert "all weights are trained" in message and "adapter=lora" in str(hint)
    message, _ = message_of(GOOD + "max_grad_norm:\nlearning_rate: null\nslots: []\n", tmp_path)
    assert message.startswith("run.yaml:5: slots is []")  # null is a value of max_grad_norm
    config, notes = load_config(write(tmp_path, GOOD + "max_grad_norm:\n"))
    assert config.max_grad_norm is None and notes == []
