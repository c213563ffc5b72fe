"""Weights that a checkpoint lacks are never trained from random values without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import horizon_lm as hz
import zoo
from horizon_lm.errors import ConfigError, DataError, UnsupportedModelError
from horizon_lm.model.loading import load_model
from horizon_lm.model.pretrained import Allowed
from horizon_lm.training.eval_command import evaluate_model
from horizon_lm.training.generate import Generator
from small_runs import settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def folder(place: Path, name: str, edit: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
    """A checkpoint of a model of the zoo, with its tensors and its configuration edited."""
    zoo.build(name).save_pretrained(place)
    if edit is not None:
        tensors = load_file(place / "model.safetensors")
        edit(tensors)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    if config:
        values = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**values, **config}))
    return place


def load(place: Path, name: str = "llama", seed: int = 0, **allowed: Any) -> Any:
    return load_model(
        place,
        trust_remote_code=False,
        revision=None,
        attn_implementation=zoo.CASES[name].attn,
        allowed=Allowed(**allowed),
        seed=seed,
    )


def without(*parts: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        found = [key for key in tensors if any(part in key for part in parts)]
        assert found, parts
        for key in found:
            tensors.pop(key)

    return edit


def plus(**extra: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key.replace("__", "."): value for key, value in extra.items()})


def of_width(rows: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({"lm_head.weight": torch.zeros(rows, 32)})


REFUSED: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "one missing": ("llama", without(UP), rf"1 weight missing: {UP}"),
    "several": ("llama", without("up_proj.weight"), "4 weights missing: .*layers.0.mlp.up_proj.weight"),
    "many": ("llama", without("mlp"), "and 8 more"),
    "head": ("llama", without("lm_head"), "1 weight missing: lm_head.weight"),
    "table": ("llama-tied", without("embed_tokens"), "missing: .*model.embed_tokens.weight"),
    "buffer": ("deepseek_v3", without("e_score_correction_bias"), "missing: .*e_score_correction_bias"),
    "unknown": ("llama", plus(v_head__weight=torch.ones(3)), "1 weight unknown to the model: v_head.weight"),
    "renamed": (
        "llama",
        lambda t: t.update({UP.replace("up", "uq"): t.pop(UP)}),
        "missing: model.layers.1.mlp.up_proj.weight; 1 weight unknown to the model: model.layers.1.mlp.uq",
    ),
    "shape": ("llama", of_width(90), "1 weight of another shape: lm_head.weight is 90 x 32, the model's 96"),
    "expert": ("mixtral", without("layers.0.block_sparse_moe.experts.1.w1"), "layers.0.mlp.experts.gate_up"),
    "experts": ("mixtral", without("layers.0.block_sparse_moe.experts"), "2 weights missing: .*mlp.experts"),
    "a layer too many": (
        "llama",
        lambda t: t.update({k.replace("s.3.", "s.4."): v.clone() for k, v in t.items() if "layers.3" in k}),
        "unknown to the model: model.layers.4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    name, edit, words = REFUSED[case]
    place = folder(tmp_path / "m", name, edit)
    capfd.readouterr()
    with pytest.raises(DataError, match=words) as caught:
        load(place, name)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert len(caught.value.message) < 600
    assert "LOAD REPORT" not in capfd.readouterr().err + caplog.text


def prefixless(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.startswith(("model.", "transformer."))]:
        tensors[key.partition(".")[2]] = tensors.pop(key)


def old_gpt2(tensors: Tensors) -> None:
    """As the first checkpoints of GPT-2 on the Hub: without a prefix, and with their masks."""
    prefixless(tensors)
    for layer in range(4):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


TAKEN: dict[str, tuple[str, Callable[[Tensors], Any] | None]] = {
    "as it is": ("llama", None),
    "tied, head absent": ("llama-tied", None),
    "tied, head saved": (
        "llama-tied",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    ),
    "base model": ("llama-tied", prefixless),
    "old gpt2": ("gpt2", old_gpt2),
    "rotary tables": ("llama", plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
    "prediction layers": ("qwen3_next", plus(mtp__layers__0__weight=torch.ones(4))),
    "masked bias": ("gptj", plus(transformer__h__0__attn__masked_bias=torch.tensor(1.0))),
    **{name: (name, None) for name in ("mixtral", "deepseek_v3", "gpt_oss", "gemma2", "falcon", "bloom")},
}


@pytest.mark.parametrize("case", TAKEN)
def test_common_checkpoints_are_taken(case: str, tmp_path: Path) -> None:
    """Negative control: what transformers itself fills in or leaves out is no fault."""
    name, edit = TAKEN[case]
    loaded = load(folder(tmp_path / "m", name, edit), name).state_dict()
    for key, value in zoo.build(name).state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_what_is_allowed_is_initialised_from_the_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = folder(tmp_path / "m", "llama", without(UP, "lm_head"))
    state = torch.get_rng_state()
    first = load(place, seed=1, missing=[r"layers\.\d+\.mlp", "^lm_head"])
    assert torch.equal(torch.get_rng_state(), state)
    said = [r.message for r in caplog.records if r.name.startswith("horizon_lm")]
    assert len(said) == 1
    assert f"random values (allow_missing) for 2 weights: lm_head.weight, {UP}" in said[0]
    again, other = (load(place, seed=s, missing=["up_proj", "lm_head"]) for s in (1, 2))
    weights = [dict(m.named_parameters()) for m in (first, again, other)]
    for name in (UP, "lm_head.weight"):
        assert torch.equal(weights[0][name], weights[1][name])
        assert not torch.equal(weights[0][name], weights[2][name])
        std = first.config.initializer_range
        assert 0.5 * std < float(weights[0][name].detach().std()) < 1.5 * std, "as transformers draws it"
    with pytest.raises(DataError, match="1 weight missing: lm_head.weight"):
        load(place, missing=["up_proj"])
    with pytest.raises(ConfigError, match=r"allow_missing: '\(' is not a regular expression"):
        load(place, missing=["("])


def test_the_hint_is_a_pattern_that_helps(tmp_path: Path) -> None:
    place = folder(tmp_path / "m", "llama", lambda t: (without("up_proj")(t), plus(v__x=torch.ones(1))(t)))
    with pytest.raises(DataError) as caught:
        load(place)
    hint = str(caught.value.hint)
    pattern = hint.partition("allow_missing: ['")[2].partition("'")[0]
    extra = hint.partition("allow_unexpected: ['")[2].partition("'")[0]
    assert load(place, missing=[pattern], unexpected=[extra])


def test_another_shape_and_unknown_weights_are_allowed(tmp_path: Path) -> None:
    place = folder(tmp_path / "m", "llama", of_width(90))
    assert load(place, missing=["lm_head"]).lm_head.weight.shape == (96, 32)
    place = folder(tmp_path / "n", "llama", plus(v_head__weight=torch.ones(3)))
    assert load(place, unexpected=["v_head"]) is not None
    with pytest.raises(DataError, match="unknown"):
        load(place, unexpected=["w_head"])


def test_the_settings_reach_the_loader(tmp_path: Path) -> None:
    place = folder(tmp_path / "m", "llama", without(UP))
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True}
    with pytest.raises(DataError, match="missing"):
        hz.HostModel.from_pretrained(place, **values)
    model = hz.HostModel.from_pretrained(place, **values, allow_missing=["up_proj"])
    assert torch.isfinite(dict(model.named_parameters())[UP]).all()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """A model with a tokenizer, and a weight that is missing."""
    from horizon_lm.data.tokenizer import train_tokenizer

    place = folder(tmp_path / "m", "llama", without(UP))
    train_tokenizer([], 300).save_pretrained(place)
    yield place


def test_generate_and_eval_refuse_it_too(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        Generator.load(damaged, device="cpu")
    assert "allow_missing" not in str(caught.value.hint), "which is no option there"
    changes = {"init_model": None, "train_tokenizer_vocab_size": None, "model_name_or_path": str(damaged)}
    config = settings(write_text(tmp_path / "t.txt"), tmp_path / "run", **changes)
    with pytest.raises(DataError, match="missing"):
        evaluate_model(config)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(DataError, match=shards[1].name):
        load(tmp_path)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    place = folder(tmp_path / "m", "llama", quantization_config=quantised)
    with pytest.raises(UnsupportedModelError, match="quantised .gptq"):
        load(place)
    place = folder(tmp_path / "n", "llama", quantization_config={"quant_method": "nobody knows"})
    with pytest.raises(UnsupportedModelError, match="quantised .nobody knows"):
        load(place)
    model = zoo.build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="int8"):
        hz.HostModel.from_pretrained(model, device="cpu", dtype="float32")


def test_fp8_weights_are_turned_back(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: eight bits and a scale for each block."""

    def eight_bits(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith("proj.weight")]:
            tensors[key] = (tensors[key] / 2).to(torch.float8_e4m3fn)
            tensors[key + "_scale_inv"] = torch.full((1, 1), 2.0)

    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    model = load(folder(tmp_path / "m", "llama", eight_bits, quantization_config=scheme))
    for key, value in zoo.build("llama").state_dict().items():
        assert (model.state_dict()[key].float() - value).norm() < 0.05 * value.norm(), key
    hz.HostModel.from_pretrained(model, device="cpu", dtype="float32", skip_memory_check=True)


def test_a_model_object_without_values_is_refused() -> None:
    kind, config = type(zoo.build("llama")), zoo.CASES["llama"].config()
    with torch.device("meta"):
        hollow = kind(config)
    with pytest.raises(DataError, match=r"no values for \d+ of its \d+ tensors: model.embed_tokens.weight"):
        hz.HostModel.from_pretrained(hollow, device="cpu", dtype="float32")
    model = zoo.build("llama")
    model.lm_head = nn.LazyLinear(96, bias=False)
    with pytest.raises(DataError, match="no values for 1 of its .* lm_head.weight"):
        hz.HostModel.from_pretrained(model, device="cpu", dtype="float32")
    partly = zoo.build("llama")
    partly.model.norm.to("meta")
    with pytest.raises(DataError, match=r"model.norm.weight"):
        hz.HostModel.from_pretrained(partly, device="cpu", dtype="float32")


def test_a_consumed_model_cannot_be_adopted_again() -> None:
    model = zoo.build("llama")
    hz.HostModel.from_pretrained(model, device="cpu", dtype="float32", skip_memory_check=True)
    with pytest.raises(ConfigError, match="was handed to HostModel before"):
        hz.HostModel.from_pretrained(model, device="cpu", dtype="float32", skip_memory_check=True)
