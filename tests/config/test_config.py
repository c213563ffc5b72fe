"""Settings: what is written comes back, what is wrong is named, nothing is guessed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config_files import BASE
from horizon_lm import errors
from horizon_lm.config import DatasetConfig, ModelSettings, TrainConfig
from horizon_lm.config import yaml as config_yaml
from horizon_lm.config.aliases import ALIASES, DROPPED
from horizon_lm.errors import ConfigError
from sizes import times

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


# --- round trip -----------------------------------------------------------------------------------


@settings(max_examples=times(50, 500), deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=times(50, 500), deadline=None)
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
    "report_to": ["neptune", 3, ["wandb", "x"]],
    "dataset_num_proc": [0, -1, "all", True],
    "dataloader_num_workers": [-1, 65, "auto"],
    "buffer_size": [0, None],
    "chat_template": ["", 3],
    "peak_tflops": [0, -1.0, "fast"],
}

TOGETHER = [
    ({"val_size": 0.1, "eval_datasets": "a"}, "'val_size' and 'eval_datasets' are both given"),
    ({"eval_strategy": "steps"}, "there is no evaluation data"),
    ({"truncation": "split", "loss_on": "assistant"}, "would separate answers from their prompts"),
    ({"streaming": True}, "streaming needs max_steps"),
    ({"streaming": True, "max_steps": 5, "val_size": 5}, "val_size is not supported with streaming"),
    (
        {"streaming": True, "max_steps": 5, "datasets": [{"path": "a", "weight": 2}]},
        "weights of datasets are not supported",
    ),
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
        with pytest.raises(ConfigError, match=f"{name} is not supported: it depends") as caught:
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
    fields = {"field_messages": "turns", "field_chosen": "good", "field_rejected": "rejected"}
    for kind in ("chat_template.default", "chatml.intel", "llama3.argilla", "chatml"):
        assert entry(type=kind, **fields) == DatasetConfig(
            path="a", columns={"turns": "messages", "good": "chosen", "rejected": "rejected"}
        )
    own = {
        "field_prompt": "ask",
        "field_chosen": "good",
        "field_rejected": "bad",
        "prompt_format": "{prompt}",
    }
    columns = {"ask": "prompt", "good": "chosen", "bad": "rejected"}
    assert entry(type=own) == DatasetConfig(path="a", columns=columns)
    with pytest.raises(ConfigError, match="format"):  # other text than the columns'
        entry(type={**own, "chosen_format": "Answer: {chosen}"})
    with pytest.raises(ConfigError, match="same setting"):
        entry(field_chosen="good", columns={"bad": "rejected"})
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


@settings(max_examples=times(50, 500), deadline=None)
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


def test_a_copy_takes_names_of_other_trainers() -> None:
    config = TrainConfig.from_dict(BASE)
    assert config.replace(micro_batch_size=3).per_device_train_batch_size == 3
    with pytest.raises(ConfigError, match="are the same setting"):
        config.replace(micro_batch_size=3, per_device_train_batch_size=2)


def test_a_copy_holds_no_secret_that_a_change_brings() -> None:
    """What stays was redacted before."""
    config = TrainConfig.from_dict({**BASE, "model_revision": "https://u:first-password@h/a"})
    for key in ("model_revision", "output_dir"):
        assert "second-password" not in str(
            config.replace(**{key: "https://u:second-password@h/a"}).to_dict()
        )
    assert "***" in str(config.replace(output_dir="runs/x").model_revision)
    assert config.replace(datasets=["https://u:third-password@h/a"]).datasets[0].path == "https://***@h/a"
    assert config.replace(output_dir="plain").output_dir == "plain"  # the control


def test_model_settings_are_a_subset_of_the_same_names() -> None:
    settings_ = ModelSettings.from_dict({"torch_dtype": "fp32"}, source="HostModel")
    assert settings_.dtype == "float32"
    assert set(ModelSettings.model_fields) < set(TrainConfig.model_fields)
    with pytest.raises(ConfigError, match="HostModel: unknown key 'learning_rate'") as caught:
        ModelSettings.from_dict({"learning_rate": 1.0}, source="HostModel")
    assert "horizon train" in (caught.value.hint or "")


def test_a_model_that_is_not_trained_has_nothing_that_is() -> None:
    asked = {"adapter": "dora", "lora_r": 3, "use_rslora": True, "freeze": ["a"], "train": ["b"]}
    asked |= {"train_projector": True, "lr_factors": {"a": 2.0}}
    assert ModelSettings(**asked, base_dtype="nf4").untrained() == ModelSettings(base_dtype="nf4")


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
        "OtherBaseError": 5,
        "NonFiniteError": 6,
        "LossSpikeError": 6,
        "UploadError": 7,
        "CallbackError": 1,
        "RankError": 1,
        "OutputLostError": 1,
        "StoppedError": 75,
    }
