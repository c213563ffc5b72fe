"""Settings: what is written comes back, what is wrong is named, nothing is guessed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from horizon_lm import config_yaml, errors
from horizon_lm.config import SCHEDULER_KWARGS, DatasetConfig, ModelSettings, TrainConfig, load_config
from horizon_lm.config_aliases import ALIASES, DROPPED, UNAVAILABLE
from horizon_lm.config_base import GROUPS
from horizon_lm.config_docs import markdown, rows, settings_help
from horizon_lm.errors import ConfigError

BASE: dict[str, Any] = {"model_name_or_path": "folder", "datasets": "text.jsonl"}
DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"

text = st.text(max_size=30)
some_text = st.text(min_size=1, max_size=30)
counts = st.integers(1, 10**12)
positive = st.floats(1e-300, 1e300)
share = st.floats(0, 1, exclude_max=True)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
)
json_like = st.recursive(
    scalars | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
dataset_entries = some_text | st.fixed_dictionaries(
    {"path": some_text},
    optional={
        "format": st.sampled_from(["auto", "text"]),
        "columns": st.dictionaries(text, text, max_size=2),
        "text_column": some_text,
    },
)
schedulers = st.sampled_from(
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
    ]
)
models = st.fixed_dictionaries({"model_name_or_path": some_text}) | st.builds(
    lambda extra, vocabulary: {
        "init_model": {**extra, "model_type": "llama"},
        "train_tokenizer_vocab_size": vocabulary,
    },
    st.dictionaries(text, json_like, max_size=4),
    st.none() | st.integers(257, 10**6),
)
others = st.fixed_dictionaries(
    {"datasets": some_text | st.lists(dataset_entries, min_size=1, max_size=3)},
    optional={
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
        "dtype": st.sampled_from(["bfloat16", "float32"]),
        "trust_remote_code": st.booleans(),
        "model_revision": st.none() | text,
        "seed": st.integers(0, 2**63 - 1),
        "slots": st.integers(2, 100),
        "loss_chunk_tokens": st.just("auto") | counts,
        "adam_beta1": share,
        "adam_epsilon": st.floats(1e-37, 1e30),
        "optim": st.sampled_from(["adamw", "adam", "sgd", "lion"]),
        "update": st.sampled_from(["auto", "sync", "deferred"]),
        "moment_dtype": st.sampled_from(["float32", "bfloat16"]),
        "lr_factors": st.dictionaries(text, st.floats(0, 1e3), max_size=2),
        "activations": st.sampled_from(["auto", "keep", ["keep*3", "recompute"]]),
        "boundaries": st.sampled_from(["auto", "host", ["host"]]),
        "optimizer_threads": st.just("auto") | counts,
        "max_train_bytes": st.none() | counts,
        "max_length": st.integers(2, 10**9),
        "num_train_epochs": positive,
        "max_steps": st.just(-1) | counts,
        "learning_rate": st.just(0.0) | positive | counts,
        "warmup_steps": share | st.integers(0, 10**9),
        "max_grad_norm": st.none() | positive,
        "output_dir": some_text,
        "run_name": st.none() | text,
        "sample_prompt": st.none() | text,
        "save_dtype": st.sampled_from([None, "bfloat16", "float32"]),
        "max_shard_size": st.sampled_from(["5GB", "500MB", "10KB"]),
    },
)
valid = st.builds(
    lambda *parts: {k: v for part in parts for k, v in part.items()}, models, others, schedulers
)


def write(folder: Path, content: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message_of(content: str, folder: Path) -> tuple[str, str | None]:
    """The fault of a file with this content, the file's folder removed."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, content))
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value)
    return caught.value.message.replace(f"{folder}/", ""), caught.value.hint


def read(content: str) -> Any:
    return config_yaml.read_value(content, "test")


# --- round trip -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(valid)
def test_what_is_written_is_read_back_identically(values: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(values)
    written = config.to_yaml()
    document = config_yaml.read_text(written, "run.yaml")
    assert document.values == config.to_dict()
    again = TrainConfig.from_document(document)
    assert again == config
    assert again.to_yaml() == written
    assert yaml.safe_load(written) == config.to_dict()  # other programs read the same values


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(text, json_like, max_size=5))
@example({"<<": None, "no": "yes", "1": "1e5", "=": "0o7", "~": "", "a": "\u2028\ufeff\x85", "b": "1:30"})
def test_any_plain_mapping_survives_the_writer(values: dict[str, Any]) -> None:
    def typed(value: Any) -> Any:  # == alone takes True for 1 and 1 for 1.0
        if isinstance(value, dict):
            return [(key, typed(entry)) for key, entry in value.items()]
        return [typed(entry) for entry in value] if isinstance(value, list) else (type(value), value)

    assert typed(config_yaml.read_text(config_yaml.dump(values), "test").values) == typed(values)


WRONG: dict[str, list[Any]] = {
    "learning_rate": [True, "fast", -1.0, None, [1e-5], {"a": 1}],
    "max_length": [True, 1, 512.5, 512.0, "512", None],
    "trust_remote_code": [1, 0, "yes", None, "true"],
    "packing": [1, None, "true"],
    "dtype": ["float16", 16, None],
    "slots": [1, 0, -3, "two"],
    "warmup_steps": [-1, 1.0, 2.5, True, "0.1"],
    "loss_chunk_tokens": [0, -1, "all", True, 1.5],
    "max_steps": [0, -2, 1.5],
    "datasets": [
        [],
        "",
        3,
        None,
        [3],
        [None],
        [{"format": "text"}],
        [{"path": 3}],
        [{"path": "x", "formt": "text"}],
    ],
    "device": ["gpu", "cuda:", "cuda:x", 0, "cuda:0\n"],
    "max_shard_size": ["5", "0GB", "5 potatoes", 5],
    "init_model": ["llama", [1]],
    "lr_scheduler_type": ["reduce_lr_on_plateau", "greedy", "one_cycle", True],
    "label_smoothing_factor": [-0.1, 1.0, True],
    "early_stopping_patience": [0, 1.5],
    "hub_model_id": ["a/b/c", ""],
    "lr_scheduler_kwargs": [{"min_lr": 0.1}, "min_lr", {"num_cycles": [1]}],
    "adam_beta2": [1.0, -0.1],
    "seed": [-1, 2**63, 1.0],
    "train_tokenizer_vocab_size": [256, "8k"],
    "run_name": [3, True],
    "output_dir": ["", None],
    "max_grad_norm": [-1.0, "off"],
    "optim": ["adamw_8bit", "", None],
    "moment_dtype": ["float16", "int8"],
    "lr_factors": [{"norm": -1.0}, {"norm": True}, ["norm"], {"norm": "half"}],
    "optimizer_threads": [0, -1, "all", True],
    "activations": ["offload", [], ["keep*0"], ["keep", "device"], ["keep*x"], [3]],
    "boundaries": ["disk", [], ["host*"], ["recompute"]],
    "update": ["lazy", None],
    "packing_strategy": ["best", None, True],
    "truncation": ["cut", None],
    "loss_on": ["user", True],
    "on_bad_row": ["ignore", False],
    "val_size": [-1, 1.0, 2.5, True, "0.1"],
    "eval_strategy": ["often", False],
    "eval_datasets": ["", 3, [None], [{"path": "x", "formt": "text"}]],
    "report_to": ["mlflow", 3, ["wandb", "x"]],
    "dataset_num_proc": [0, -1, "all", True],
    "dataloader_num_workers": [-1, 65, "auto"],
    "buffer_size": [0, None],
    "chat_template": ["", 3],
    "peak_tflops": [0, -1.0, "fast"],
}

TOGETHER = [
    ({"val_size": 0.1, "eval_datasets": "a"}, "'val_size' and 'eval_datasets' are both given"),
    ({"eval_strategy": "steps"}, "nothing to evaluate on"),
    ({"truncation": "split", "loss_on": "assistant"}, "would cut an answer from its question"),
    ({"streaming": True}, "streaming needs max_steps"),
    ({"streaming": True, "max_steps": 5, "val_size": 5}, "takes a part of data that is read whole"),
    ({"streaming": True, "max_steps": 5, "datasets": [{"path": "a", "weight": 2}]}, "a weight takes data"),
]


@pytest.mark.parametrize(("values", "message"), TOGETHER)
def test_settings_of_data_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_dict({**BASE, **values})
    assert caught.value.hint and "\n" not in caught.value.message


def test_curves_under_other_names_and_those_that_cannot_be() -> None:
    config = TrainConfig.from_dict(
        {**BASE, "lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": 3}}
    )
    assert config.lr_scheduler_type == "warmup_stable_decay"
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ConfigError, match=f"{name} is not supported: it follows") as caught:
            TrainConfig.from_dict({**BASE, "lr_scheduler_type": name})
        assert "lr_scheduler_type=cosine" in str(caught.value.hint)
    for name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        with pytest.raises(ConfigError, match=f"{name} needs either min_lr or min_lr_rate"):
            TrainConfig.from_dict({**BASE, "lr_scheduler_type": name})
    with pytest.raises(ConfigError, match="polynomial has no argument 'min_lr'") as caught:
        TrainConfig.from_dict(
            {**BASE, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"min_lr": 0.1}}
        )
    assert caught.value.hint == "polynomial takes lr_end, power"


def test_what_goes_together_with_data() -> None:
    config = TrainConfig.from_dict(
        {**BASE, "streaming": True, "max_steps": 5, "eval_datasets": ["a", {"path": "b", "split": "test"}]}
    )
    assert [entry.path for entry in config.eval_datasets] == ["a", "b"]
    assert TrainConfig.from_dict({**BASE, "report_to": "none"}).report_to == []
    assert TrainConfig.from_dict({**BASE, "report_to": "wandb"}).report_to == ["wandb"]
    assert TrainConfig.from_dict({**BASE, "eval_datasets": None}).eval_datasets == []


def test_an_entry_of_datasets_as_axolotl_writes_it() -> None:
    def entry(**values: Any) -> DatasetConfig:
        return TrainConfig.from_dict({**BASE, "datasets": [{"path": "a", **values}]}).datasets[0]

    assert entry(type="chat_template", field_messages="turns") == DatasetConfig(
        path="a", format="messages", columns={"turns": "messages"}
    )
    assert entry(type="completion", field="body") == DatasetConfig(
        path="a", format="text", text_column="body"
    )
    assert entry(type="alpaca").format == "alpaca" and entry(type="sharegpt.load_role").format == "sharegpt"
    with pytest.raises(ConfigError, match="same setting"):
        entry(type="alpaca", format="alpaca")
    with pytest.raises(ConfigError, match="format is input_output"):
        entry(type="input_output")


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_by_name(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ConfigError, match=key) as caught:
            TrainConfig.from_dict({**BASE, key: value})
        assert "\n" not in caught.value.message, caught.value.message
        with pytest.raises(ConfigError, match=key):
            TrainConfig(**{**BASE, key: value})


@settings(max_examples=100, deadline=None)
@given(valid, st.data())
def test_a_mutated_key_is_refused_by_name(values: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(values)))
    position = data.draw(st.integers(0, len(key) - 1))
    broken = (
        key[:position] + data.draw(st.sampled_from(["", "x", "_q", key[position] * 2])) + key[position + 1 :]
    )
    if broken in TrainConfig.model_fields or broken in ALIASES or broken in DROPPED:
        return
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(
            {**BASE, broken: values[key]} if key in BASE else {**values, broken: values[key]}
        )
    assert f"unknown key '{broken}'" in str(caught.value)


def test_non_finite_numbers_from_python_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="learning_rate: .* not a finite number"):
            TrainConfig.from_dict({**BASE, "learning_rate": value})
        with pytest.raises(ConfigError, match="rope_theta"):
            TrainConfig(
                init_model={"model_type": "llama", "rope_theta": value}, datasets=[DatasetConfig(path="x")]
            )


# --- Python interface -----------------------------------------------------------------------------


def test_python_values_become_plain_ones() -> None:
    class Bfloat16:
        __module__ = "torch"

        def __str__(self) -> str:
            return "torch.bfloat16"

    config = TrainConfig.from_dict(
        {**BASE, "datasets": (Path("a.txt"), {"path": Path("b")}), "dtype": Bfloat16()}
    )
    assert [entry.path for entry in config.datasets] == ["a.txt", "b"]
    assert config.dtype == "bfloat16"
    assert config.replace(dtype="float32").dtype == "float32"
    assert TrainConfig.from_dict({**BASE, "datasets": [DatasetConfig(path="c")]}).datasets[0].path == "c"
    with pytest.raises(ValueError):  # frozen
        config.dtype = "float32"


def test_model_settings_are_a_subset_of_the_same_names() -> None:
    settings_ = ModelSettings.from_dict({"torch_dtype": "fp32"}, source="HostModel")
    assert settings_.dtype == "float32"
    assert set(ModelSettings.model_fields) < set(TrainConfig.model_fields)
    with pytest.raises(ConfigError, match="HostModel: unknown key 'learning_rate'") as caught:
        ModelSettings.from_dict({"learning_rate": 1.0}, source="HostModel")
    assert "horizon train" in (caught.value.hint or "")


def test_errors_carry_message_hint_and_code() -> None:
    error = errors.DataError("no text", "give a file")
    assert str(error) == "no text\n  hint: give a file"
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    codes = {name: getattr(errors, name).exit_code for name in dir(errors) if name.endswith("Error")}
    assert codes == {
        "HorizonError": 1,
        "ConfigError": 2,
        "UnsupportedModelError": 2,
        "DoesNotFitError": 3,
        "DataError": 4,
        "CheckpointError": 5,
        "TornStateError": 5,
        "NonFiniteError": 6,
        "LossSpikeError": 6,
        "UploadError": 7,
        "CallbackError": 1,
        "OutputLostError": 1,
        "StoppedError": 75,
    }


# --- aliases --------------------------------------------------------------------------------------

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
    "attn_impl": ("eager", "eager"),
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


# --- strict YAML ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("1e-5", 1e-5), ("1.e3", 1000.0), (".5", 0.5), ("-1E+2", -100.0), ("1.0e-5", 1e-5)],
        *[("010", 10), ("0x1F", 31), ("0o17", 15), ("-3", -3), ("1_000", "1_000")],
        *[("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("=", "="), ("inf", "inf")],
        *[
            ("true", True),
            ("False", False),
            ("yes", "yes"),
            ("no", "no"),
            ("on", "on"),
            ("off", "off"),
            ("y", "y"),
        ],
        *[("null", None), ("~", None), ("", None), ("'1'", "1"), ('"true"', "true"), ("${HOME}", "${HOME}")],
        *[("[1, a]", [1, "a"]), ("{a: 1, 2: b}", {"a": 1, "2": "b"})],
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    result = read(written)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("seed: 1\nslots: 2\nseed: 2\n", 3, "duplicate key 'seed'"),
        ("seed: 1\ninit_model:\n  a: 1\n  a: 2\n", 4, "duplicate key 'a'"),
        ("seed: !!int '1'\n", 1, "the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("seed: !!python/object/apply:os.system [ls]\n", 1, "is not allowed"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", 3, "merge keys"),
        ("seed:\n\t- 1\n", 2, "cannot start any token"),
        ("seed: 1\n  slots: 2\n", 2, "mapping values are not allowed"),
        ("a: [1, 2\n", 2, "expected ',' or ']'"),
        ("seed: 1\n---\nseed: 2\n", 2, "another document"),
        ("learning_rate: .nan\n", 1, "not a finite number"),
        ("\nlearning_rate: -.inf\n", 2, "not a finite number"),
        ("learning_rate: 1e999\n", 1, "not a finite number"),
        (f"seed: {'9' * 5000}\n", 1, "too large"),
        ("seed: 1\nname: a\x07b\n", 2, "U+0007 is not allowed"),
        ("? [a]\n: 1\n", 1, "a key must be text"),
        ("a: &x [*x]\n", 1, "to themselves"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: " + "[" * 200, 1, "nested deeper"),
    ],
)
def test_faults_of_yaml_name_file_and_line(content: str, line: int, problem: str, tmp_path: Path) -> None:
    message, _ = message_of(content, tmp_path)
    assert message.startswith(f"run.yaml:{line}: ") and problem in message and "\n" not in message


def test_aliases_cannot_explode(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "expand to too many values" in message_of("\n".join(levels), tmp_path)[0]


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert (
        message_of("- 1\n", tmp_path)[0] == "run.yaml: expected lines of the form 'key: value', found a list"
    )
    assert "found text" in message_of("hello\n", tmp_path)[0]
    assert "no model" in message_of("datasets: a\n", tmp_path)[0]
    assert message_of("", tmp_path)[0] == "run.yaml: the key 'datasets' is missing"
    assert "larger than" in message_of("#" * (1 << 20) + "#", tmp_path)[0]
    with pytest.raises(ConfigError, match="run.yaml:2: not UTF-8 text"):
        load_config(write(tmp_path, b"seed: 1\nrun_name: \xff\n"))
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with_mark = write(tmp_path, b"\xef\xbb\xbfmodel_name_or_path: m\r\ndatasets: d\r\n")
    assert load_config(with_mark)[0].datasets == [DatasetConfig(path="d")]


# --- the shape of errors --------------------------------------------------------------------------

GOOD = "model_name_or_path: m\ndatasets: d\n"


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("learnig_rate: 1", "run.yaml:3: unknown key 'learnig_rate'", "did you mean 'learning_rate'?"),
        ("cutof_len: 1", "run.yaml:3: unknown key 'cutof_len'", "did you mean 'max_length'?"),
        ("zzz: 1", "run.yaml:3: unknown key 'zzz'", "'horizon train --help' lists every setting"),
        ("slots: many", "run.yaml:3: slots is many, expected a whole number >= 2", None),
        ("slots: 4.0", "run.yaml:3: slots is 4.0, expected a whole number >= 2", "write 4"),
        ("dtype: bf16", "run.yaml:3: dtype is bf16, expected bfloat16 | float32", "did you mean 'bfloat16'?"),
        ("plot_loss: yes", "run.yaml:3: plot_loss is yes, expected true or false", "write true"),
        (
            "run_name: 5",
            "run.yaml:3: run_name is 5, expected text or null",
            "put it in quotes to make it text",
        ),
        (
            "warmup_steps: 1.5",
            "run.yaml:3: warmup_steps is 1.5, expected a whole number >= 0, or a share of all steps below 1",
            None,
        ),
        (
            "init_model:\n  model_type: llama",
            "run.yaml:1: 'model_name_or_path' and 'init_model' are both given",
            "keep one of them, or set the other to null",
        ),
        (
            "train_tokenizer_vocab_size: 4096",
            "run.yaml:3: train_tokenizer_vocab_size needs init_model",
            "an existing model keeps its own tokenizer",
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
def test_a_fault_is_one_line_and_a_hint(line: str, message: str, hint: str | None, tmp_path: Path) -> None:
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
        "val_size takes a part of data that is read whole",
        "cosine_with_min_lr needs either min_lr or min_lr_rate",
        "there is nothing to go back to with save_strategy: no",
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
    message, hint = message_of(AXOLOTL.replace("load_in_8bit: false", "load_in_8bit: true"), tmp_path)
    assert message == "run.yaml:4: unknown key 'load_in_8bit'" and "leave the key out" in str(hint)
    message, _ = message_of(GOOD + "max_grad_norm:\nlearning_rate: null\nslots: []\n", tmp_path)
    assert message.startswith("run.yaml:5: slots is []")  # null is a value of max_grad_norm
    config, notes = load_config(write(tmp_path, GOOD + "max_grad_norm:\n"))
    assert config.max_grad_norm is None and notes == []


# --- overrides ------------------------------------------------------------------------------------


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


# --- documentation --------------------------------------------------------------------------------


def test_every_setting_is_documented() -> None:
    listed = settings_help()
    for row in rows(TrainConfig):
        assert f"\n  {row.key} = {row.default}\n" in listed
        assert row.meaning.endswith(".") and row.expects
    for info in TrainConfig.model_fields.values():
        assert isinstance(info.json_schema_extra, dict) and info.json_schema_extra["group"] in GROUPS


def test_the_reference_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), "run: horizon config docs > docs/configuration.md"


def test_scheduler_names_are_those_of_transformers() -> None:
    source = (
        Path(__import__("importlib.util").util.find_spec("transformers").origin).parent / "trainer_utils.py"
    )
    names = source.read_text(encoding="utf-8")
    for name in SCHEDULER_KWARGS:
        assert f'= "{name}"\n' in names
