"""The Python face: what it shows, what it takes, and what it says to the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.config.python import as_train_config
from horizon_lm.errors import ConfigError
from python_calls import ROWS, host
from python_calls import tokenizer as tokenizer
from small_runs import values, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = str(Path(hz.__file__).parent.parent)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": "100", "PAGER": "cat"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


# ---- what the package shows -----------------------------------------------------------------


def test_dir_shows_what_there_is_without_importing_it() -> None:
    done = python("-c", "import sys, horizon_lm as h; print(*dir(h)); print('torch' in sys.modules)")
    names, imported = done.stdout.splitlines()
    public = [name for name in names.split() if not name.startswith("_")]
    classes = ["HostModel", "ModelSettings", "TokenLoss", "TokenValues", "TrainConfig", "TrainResult"]
    assert public == [*classes, "errors", "train"]
    assert imported == "False" and not done.stderr
    assert set(public) <= set(hz.__all__) and all(getattr(hz, name) for name in hz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'HostModle'"):
        _ = hz.HostModle


def test_help_lists_classes_and_functions() -> None:
    text = python("-c", "import horizon_lm; help(horizon_lm)").stdout
    for wanted in ("class HostModel", "class TrainConfig", "train(config", "save_pretrained(self, folder"):
        assert wanted in text, wanted


def test_the_package_runs_as_the_command_does(tmp_path: Path) -> None:
    helped = python("-m", "horizon_lm", "train", "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("Usage: python -m horizon_lm train")
    bad = python("-m", "horizon_lm", "train", str(tmp_path / "none.yaml"))
    assert bad.returncode == 2 and "no such file" in bad.stderr
    data = python("-m", "horizon_lm", "train", "init_model={model_type: llama}", "datasets=none.jsonl")
    assert data.returncode == 4, data.stderr
    assert python("-m", "horizon_lm", "version").stdout.strip() == hz.__version__


def test_repr_says_what_the_model_is() -> None:
    text = repr(host(max_grad_norm=None))
    for wanted in (
        *(
            "LlamaForCausalLM (llama), 4 layers, 37,152 parameters",
            "float32 on cpu",
            "host memory: 532 kB (weights 152 kB",
        ),
        *("updates: adamw, eager, no clipping; 0 steps done", "device memory"),
    ):
        assert wanted in text, text
    assert max(map(len, text.splitlines())) < 120
    source = zoo.build("llama").requires_grad_(False)
    source.lm_head.requires_grad_(True)
    frozen = from_pretrained(source, device="cpu", lanes="adversarial", dtype=torch.bfloat16)
    assert "37,152 parameters (3,072 trainable)" in repr(frozen) and "bfloat16 on cpu" in repr(frozen)
    assert "deferred, max_grad_norm 1;" in repr(frozen) and "in slots" in repr(frozen)


def test_outputs_are_readable() -> None:
    model = host()
    one = zoo.batch("llama")
    out = model.train_step(one, lr=1e-3)
    assert repr(out) == (
        f"TrainStepOutput(loss={out.loss:.6g}, num_tokens={out.num_tokens}, grad_norm={out.grad_norm:.6g})"
    )
    own = model.train_step(one, lr=1e-3, loss_fn=lambda p, b: (-p.mean(), {"seen": p.numel()}))
    assert "metrics=[{'seen': " in repr(own)
    found = model.evaluate(one, return_log_probs=True)
    assert f"perplexity={found.perplexity:.6g}" in repr(found)
    assert "log_probs=<1 of shape [2, 19]>" in repr(found)


# ---- a model object that was handed over ----------------------------------------------------


USES: dict[str, tuple[Callable[[Any], object], str]] = {
    "called": (lambda m: m(**ROWS), "HostModel.evaluate"),
    "its body called": (lambda m: m.model(ROWS["input_ids"]), "HostModel.evaluate"),
    "generate": (lambda m: m.generate(ROWS["input_ids"]), "AutoModelForCausalLM"),
    "save_pretrained": (lambda m: m.save_pretrained("nowhere"), "HostModel.save_pretrained"),
    "state_dict": (lambda m: m.state_dict(), "named_parameters"),
    "load_state_dict": (lambda m: m.load_state_dict({}), "before"),
    "to": (lambda m: m.to("cpu"), "device"),
    "half": (lambda m: m.half(), "dtype"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "device"),
    "eval": (lambda m: m.eval(), "HostModel.evaluate"),
    "recomputation": (lambda m: m.gradient_checkpointing_enable(), "activations='recompute'"),
    "resizing": (lambda m: m.resize_token_embeddings(200), "before"),
    "handed over again": (lambda m: hz.HostModel.from_pretrained(m), "load the model again"),
}


def test_a_consumed_model_says_so() -> None:
    source = zoo.build("llama")
    before = source.training
    model = hz.HostModel.from_pretrained(source, device="cpu", dtype="float32")
    for name, (use, hint) in USES.items():
        with pytest.raises(ConfigError, match="was handed to HostModel") as caught:
            use(source)
        assert hint in (caught.value.hint or ""), name
        assert "LlamaForCausalLM" in caught.value.message or "LlamaModel" in caught.value.message
    assert source.training == before and source.config.model_type == "llama" and "Llama" in repr(source)
    # Ours is not disturbed: it trains as one whose object nobody has touched.
    plain = host()
    assert model.train_step(ROWS, lr=1e-3) == plain.train_step(ROWS, lr=1e-3)
    assert model.evaluate(ROWS) == plain.evaluate(ROWS)


def test_a_model_that_was_not_taken_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an error before the first weight is moved leaves the caller's object alone."""
    from horizon_lm import host_model
    from horizon_lm.errors import DoesNotFitError

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise DoesNotFitError("too large", hint="smaller")

    source = zoo.build("llama")
    expected = source(**ROWS).loss
    with monkeypatch.context() as patch, pytest.raises(DoesNotFitError):
        patch.setattr(host_model, "check_memory", refuse)
        hz.HostModel.from_pretrained(source, device="cpu")
    assert torch.equal(source(**ROWS).loss, expected)
    assert hz.HostModel.from_pretrained(source, device="cpu").num_parameters == 37152


@pytest.mark.parametrize("source", [None, 3, {"model_type": "llama"}, ["folder"]])
def test_what_is_not_a_model_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match=f"a {type(source).__name__} is not a model") as caught:
        hz.HostModel.from_pretrained(source)
    assert caught.value.hint


def test_a_module_without_a_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear is not a transformers model"):
        hz.HostModel.from_pretrained(torch.nn.Linear(2, 2))


# ---- settings from Python -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, "float32"])
@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
def test_torch_objects_are_settings(dtype: Any, device: Any, tmp_path: Path) -> None:
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device, dtype, max_grad_norm=np.float32(0.5))
    assert (model.settings.dtype, model.settings.device, model.settings.max_grad_norm) == (
        "float32",
        "cpu",
        0.5,
    )
    model.save_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.bfloat16 and model.config.dtype == torch.float32
    again = hz.HostModel.from_pretrained(tmp_path / "out", device=device, torch_dtype=dtype)
    assert again.settings.dtype == "float32"


def test_a_configuration_object_makes_a_model() -> None:
    settings = hz.ModelSettings(device="cpu", dtype="float32")
    config = zoo.build("llama").config
    one = hz.HostModel.from_config(config, device=torch.device("cpu"), dtype=torch.float32, seed=7)
    two = hz.HostModel.from_config(config.to_dict(), settings.replace(seed=7))
    assert one.evaluate(ROWS) == two.evaluate(ROWS)
    assert one.evaluate(ROWS) != hz.HostModel.from_config(config, settings).evaluate(ROWS)
    with pytest.raises(ConfigError, match="a str is not a configuration"):
        hz.HostModel.from_config("folder")
    with pytest.raises(ConfigError, match="settings and seed are both given"):
        hz.HostModel.from_config(config, settings, seed=7)


def test_a_run_takes_a_path_a_dict_a_config_or_names(tmp_path: Path) -> None:
    given = values(tmp_path / "text.txt", tmp_path / "run")
    wanted = hz.TrainConfig.from_dict(given)
    file = tmp_path / "run.yaml"
    file.write_text(wanted.to_yaml())
    for source in (wanted, given, file, str(file), {**given, "output_dir": tmp_path / "run"}):
        assert as_train_config(source, {})[0] == wanted  # type: ignore[arg-type]
        changed = as_train_config(source, {"max_steps": 3, "dtype": torch.bfloat16})[0]  # type: ignore[arg-type]
        assert changed == wanted.replace(max_steps=3, dtype="bfloat16")
        assert {"max_steps", "dtype", "learning_rate"} <= changed.model_fields_set, "chosen, so not planned"
    assert as_train_config(None, given)[0] == wanted
    assert "slots" not in as_train_config(wanted, {"max_steps": 3})[0].model_fields_set
    config, notes = as_train_config(file, {"lr": 1e-2})
    assert config.learning_rate == 1e-2 and any("'lr' is read as 'learning_rate'" in note for note in notes)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (3, {}, "an int is not a configuration"),
        ("none.yaml", {}, "none.yaml: no such file"),
        (".", {}, "is a directory"),
        ({"model_name_or_path": "x"}, {"learning_rat": 1}, r"train\(\) arguments.*learning_rat"),
        ({"model_name_or_path": "x"}, {"learning_rate": "1e-3"}, r"train\(\) arguments.*learning_rate"),
        ({"model_name_or_path": "x", "max_steps": 1.5}, {}, r"train\(\).*max_steps"),
        (None, {}, "the key 'datasets' is missing"),
    ],
)
def test_what_is_no_configuration_is_refused(source: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hz.train(source, **changes)


def test_a_run_from_a_file_and_names(tmp_path: Path, no_samples: None) -> None:
    text = write_text(tmp_path / "text.txt")
    file = tmp_path / "run.yaml"
    given = hz.TrainConfig.from_dict(values(text, tmp_path / "run", save_strategy="no"))
    file.write_text(given.to_yaml())
    result = hz.train(file, max_steps=2, progress="off")
    assert result.num_steps == 2 and result.output_dir == tmp_path / "run"
    assert hz.TrainConfig.from_yaml(result.output_dir / "config.resolved.yaml").max_steps == 2
