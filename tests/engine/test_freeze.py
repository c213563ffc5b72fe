"""`freeze`: parameters that are not trained, and what that saves."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import horizon_lm as hz
import zoo
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.config import TrainConfig
from horizon_lm.config.model import ModelSettings
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.report.flops import flops_of
from horizon_lm.training.resume import check_settings
from horizon_lm.training.train import train
from small_runs import LLAMA, settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

CASES: dict[str, tuple[str, list[str]]] = {
    "table": ("llama", ["embed_tokens"]),
    "lower layers": ("llama", ["embed", r"layers\.[01]\."]),
    "all but the head": ("llama", ["^(?!lm_head)"]),
    "norms and biases": ("llama-tied", ["norm", r"bias$"]),
    "tied by one of its names": ("llama-tied", ["lm_head"]),
    "tied by the other": ("llama-tied", ["embed_tokens"]),
    "experts": ("mixtral", [r"\.experts\."]),
    "routers": ("mixtral-aux", ["gate"]),
    "positions": ("gpt2", ["wpe", "wte"]),
}


def host(model: Any, **given: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, **given}
    return hz.HostModel.from_pretrained(copy.deepcopy(model), **values)


@pytest.mark.parametrize("case", CASES)
def test_the_others_train_as_in_plain_pytorch(case: str) -> None:
    name, patterns = CASES[case]
    model, batch = zoo.build(name), zoo.batch(name)
    streamed = host(model, freeze=patterns)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if any(re.search(pattern, key) for pattern in patterns):
            parameter.requires_grad_(False)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert streamed.forward_backward([batch]).loss == loss.item()
    found = dict(streamed.named_gradients())
    assert found.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.equal(found[key], wanted), key
    before = {key: value.clone() for key, value in streamed.named_parameters()}
    streamed.step(lr=1e-2, weight_decay=0.5)
    for key, value in streamed.named_parameters():
        if key in frozen:
            assert torch.equal(value, frozen[key]), f"{key} has moved"
        elif found[key].any():
            assert not torch.equal(value, before[key]), f"{key} has not moved"


def test_a_frozen_parameter_takes_its_weights_alone() -> None:
    model = zoo.build("llama")
    table = model.model.embed_tokens.weight.numel()
    whole, part = (host(model, dtype="bfloat16", freeze=f).store.num_bytes for f in ([], ["embed_tokens"]))
    assert whole["weights"] == part["weights"]
    for region, size in {"residual": 2, "exp_avg": 4, "exp_avg_sq": 4, "grads": 2}.items():
        assert whole[region] - part[region] == size * table, region


@pytest.mark.parametrize(
    ("patterns", "words", "hint"),
    [
        (["embed_tokns"], "'embed_tokns' is found in the name of no parameter", "model.embed_tokens.weight"),
        (["embed", "layres.3"], "'layres.3'", "model.layers."),
        (["("], "is not a regular expression", "lm_head"),
        (["."], "freeze leaves no parameter to train: '.'", "lm_head"),
        (["model", "lm_head"], "leaves no parameter to train", "lm_head"),
    ],
)
def test_patterns_that_make_no_sense(patterns: list[str], words: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        host(zoo.build("llama"), freeze=patterns)
    assert hint in str(caught.value.hint)
    with pytest.raises(ConfigError, match=re.escape(words)):  # and before any weight is read
        Outline(zoo.CASES["llama"].config(), ModelSettings(freeze=patterns))


def test_axolotl_names_what_is_trained() -> None:
    config = ModelSettings.from_dict({"unfrozen_parameters": ["^lm_head.weight$", "model.layers.3"]})
    assert config.freeze == []
    streamed = host(zoo.build("llama"), train=config.train)
    trained = {p.name for unit in streamed.store.units for p in unit.trainable}
    assert trained == {
        name
        for name, _ in zoo.build("llama").named_parameters()
        if name.startswith(("lm_head.weight", "model.layers.3"))
    }
    assert ModelSettings.from_dict({"unfrozen_parameters": []}).train == []
    with pytest.raises(ConfigError, match=r"\[a:b\]"):
        ModelSettings.from_dict({"unfrozen_parameters": ["^model.embed_tokens.weight$[:32000]"]})
    for key in ("finetuning_type", "freeze_trainable_layers"):
        with pytest.raises(ConfigError, match=r"train: \[patterns\]"):
            TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "d", key: "freeze"})


def test_the_planner_counts_it(tmp_path: Path) -> None:
    big = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
    common = {"init_model": big, "datasets": ["none.txt"], "max_length": 64, "dtype": "bfloat16"}
    common["resident"] = 0

    def plan(**changes: Any) -> Any:
        return plan_run(TrainConfig(**common, **changes), "h100-sxm").prediction

    whole, lower, table = plan(), plan(freeze=["embed", r"layers\.[012]\."]), plan(freeze=["embed_tokens"])
    assert whole.host["weights"] == table.host["weights"]
    assert whole.host["exp_avg"] - table.host["exp_avg"] == 4 * 4096 * 256
    assert lower.host_bytes < table.host_bytes < whole.host_bytes
    for lane in ("H2D", "GPU", "D2H", "CPU"):
        if lane in whole.lanes():
            assert lower.lanes()[lane] <= whole.lanes()[lane] * 1.001, lane
    assert lower.seconds < whole.seconds


def test_flops_of_frozen_parameters() -> None:
    """6 for a trained parameter, 4 for a frozen one with gradients through it, 2 for one without."""
    model = zoo.build("llama")
    of = {name: p.numel() for name, p in model.named_parameters() if "embed" not in name}
    layer = [sum(n for name, n in of.items() if f"layers.{i}." in name) for i in range(4)]
    whole = flops_of(host(model))
    assert whole.per_token == 6 * sum(of.values())
    lower = flops_of(host(model, freeze=["embed", r"layers\.[01]\."]))
    assert whole.per_token - lower.per_token == pytest.approx(4 * (layer[0] + layer[1]))
    assert lower.per_square == whole.per_square * (2 * 6 + 2 * 2) / (4 * 6)
    upper = flops_of(host(model, freeze=[r"layers\.[23]\."]))
    assert whole.per_token - upper.per_token == pytest.approx(2 * (layer[2] + layer[3]))
    assert upper.per_square == whole.per_square


def test_a_run_with_frozen_parameters_resumes_and_keeps_them(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    config = settings(text, tmp_path / "run", freeze=["embed_tokens", "norm"], max_steps=4, weight_decay=0.1)
    train(config)
    train(
        config.replace(
            output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )
    )
    one, two = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "b"))
    assert one == two
    # A checkpoint of before this setting was trained whole.
    then = {key: value for key, value in config.to_dict().items() if key != "freeze"}
    saved = cast(Checkpoint, SimpleNamespace(manifest=SimpleNamespace(config=then, files={}), path=tmp_path))
    check_settings(config.replace(freeze=[]), saved)
    with pytest.raises(ConfigError, match=r"freeze was \[\], is"):
        check_settings(config, saved)
    changed = config.replace(resume_from_checkpoint="latest", allow_changed_settings=True)
    for patterns in ([], ["embed_tokens"]):
        with pytest.raises((ConfigError, CheckpointError), match="freeze"):
            train(changed.replace(freeze=patterns, max_steps=6))
