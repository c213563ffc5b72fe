"""Adapters in and out of `HostModel`: by settings, as a PeftModel, from a folder; switched off and saved."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import ConfigError, DataError, HorizonError, UnsupportedModelError
from horizon_lm.model.loading import count_parameters
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.trainers.generation import named_weights
from peft_models import PREFIX, adapted, differing, host, shake, trained

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", {"adapter": "lora"}, {}),
    "dora": (
        "llama",
        {"adapter": "dora", "lora_r": 4, "lora_alpha": 8},
        {"use_dora": True, "r": 4, "lora_alpha": 8},
    ),
    "two modules": (
        "qwen3",
        {"adapter": "lora", "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ),
    "by expression": (
        "llama",
        {"adapter": "lora", "target_modules": r".*layers\.[12]\..*up_proj"},
        {"target_modules": r".*layers\.[12]\..*up_proj"},
    ),
    "with a head": (
        "llama",
        {"adapter": "lora", "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ),
    "experts": ("mixtral", {"adapter": "lora"}, {}),
}


def test_a_new_adapter_is_made_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    host(zoo.build("llama"), adapter="lora")
    assert not [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)]


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_begin_as_peft_does(case: str) -> None:
    """The same names and, from the same seed, the same values; so does the planner, without weights."""
    name, ours, theirs = SETTINGS[case]
    streamed = host(zoo.build(name), seed=11, **ours)
    values = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **theirs}
    torch.manual_seed(11)
    model = peft.get_peft_model(zoo.build(name), peft.LoraConfig(**values))
    named = {key.removeprefix(PREFIX): p.detach() for key, p in model.named_parameters()}
    assert differing(dict(streamed.named_parameters()), named) == []
    wanted = set(trained(model))
    assert {p.name for unit in streamed.skeleton.units for p in unit.trainable} == wanted
    settings = ModelSettings(device="cpu", dtype="float32", **ours)
    assert Outline(zoo.CASES[name].config(), settings).units == streamed.skeleton.units
    number = sum(named[key].numel() for key in wanted)
    everything = sum(p.numel() for p in named.values())
    assert count_parameters(zoo.CASES[name].config().to_dict(), settings) == (number, everything - number)
    other = host(zoo.build(name), seed=12, **ours)
    changed = differing(dict(streamed.named_parameters()), dict(other.named_parameters()))
    assert changed and all("lora_A" in key for key in changed)


def test_dtypes_of_an_adapter() -> None:
    """One of the settings is computed in the model's dtype, and its masters are fp32 as all others are."""
    streamed = host(zoo.build("llama", dtype=torch.bfloat16), "bfloat16", adapter="lora")
    assert streamed.kept_in_fp32 == []
    outline = Outline(zoo.CASES["llama"].config(), ModelSettings(device="cpu", adapter="lora"))
    assert outline.units == streamed.skeleton.units


# A PeftModel is consumed.


USES: dict[str, Callable[[Any], Any]] = {
    "a call": lambda model: model(input_ids=torch.zeros(1, 3, dtype=torch.long)),
    "save_pretrained": lambda model: model.save_pretrained("nowhere"),
    "state_dict": lambda model: model.state_dict(),
    "the tuner's call": lambda model: model.base_model(input_ids=torch.zeros(1, 3, dtype=torch.long)),
    "merging": lambda model: model.merge_and_unload(),
    "switching off": lambda model: model.disable_adapter().__enter__(),
    "the base's call": lambda model: model.get_base_model()(input_ids=torch.zeros(1, 3, dtype=torch.long)),
    "HostModel": lambda model: hz.HostModel.from_pretrained(model),
    "HostModel of the base": lambda model: hz.HostModel.from_pretrained(model.get_base_model()),
}


def test_a_peft_model_is_consumed() -> None:
    model = adapted("llama")
    streamed = hz.HostModel.from_pretrained(model, device="cpu", dtype="float32")
    for use, call in USES.items():
        with pytest.raises(ConfigError, match="was handed to HostModel"):
            call(model)
            pytest.fail(use)
    streamed.train_step([zoo.batch("llama")], lr=1e-3)
    assert "trainable" in repr(streamed) and "adapter: lora r=3" in repr(streamed)


# Switched off.


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}),
        ("mixtral", {}),
        ("gpt2", {}),
    ],
)
def test_the_base_alone(name: str, config: dict[str, Any]) -> None:
    model, batch = adapted(name, **config), zoo.batch(name)
    streamed, base = host(model), host(zoo.build(name))
    streamed.train_step([batch], lr=1e-2)  # deferred: the update runs during the next call
    off = streamed.evaluate([batch], adapter=False, return_log_probs=True)
    wanted = base.evaluate([batch], return_log_probs=True)
    assert off.loss == wanted.loss and off.log_probs and wanted.log_probs
    assert torch.equal(off.log_probs[0], wanted.log_probs[0])
    on = streamed.evaluate([batch])
    assert abs(on.loss - off.loss) > 1e-4
    assert streamed.evaluate([batch]).loss == on.loss
    with pytest.raises(ConfigError, match="no adapter"):
        base.evaluate([batch], adapter=False)


def test_it_is_on_again_after_an_error() -> None:
    streamed, batch = host(adapted("llama")), zoo.batch("llama")
    before = streamed.evaluate([batch]).loss
    with pytest.raises(DataError):
        streamed.evaluate([{key: value + 10**6 for key, value in batch.items()}], adapter=False)
    with pytest.raises(ZeroDivisionError), streamed.skeleton.without_adapter():
        raise ZeroDivisionError
    assert streamed.evaluate([batch]).loss == before


# Saved and trained further.


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("bases") / name
            zoo.build(name).save_pretrained(made[name])
        return made[name]

    return base


SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"adapter": "lora", "lora_r": 4}),
    "dora with a head": ("llama", {"adapter": "dora", "lora_r": 4, "modules_to_save": ["lm_head"]}),
    "experts": ("mixtral", {"adapter": "lora", "lora_r": 2}),
}


@pytest.mark.parametrize("case", SAVED)
def test_peft_loads_what_is_saved(case: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    name, settings = SAVED[case]
    streamed = hz.HostModel.from_pretrained(bases(name), device="cpu", dtype="float32", **settings)
    batch = zoo.batch(name)
    for _ in range(2):
        streamed.train_step([batch], lr=1e-2)
    streamed.save_pretrained(tmp_path / "tuned")
    found = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    written = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    assert written["inference_mode"] and written["base_model_name_or_path"] == str(bases(name))
    base = transformers_model(bases(name))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "tuned", is_trainable=True)
    theirs = {key.removeprefix(PREFIX): p.detach() for key, p in loaded.named_parameters()}
    assert differing(dict(streamed.named_parameters()), theirs) == []
    again = host(loaded.train())  # and so equal logits
    assert again.forward_backward([batch]).loss == streamed.forward_backward([batch]).loss
    assert differing(dict(again.named_gradients()), dict(streamed.named_gradients())) == []
    with torch.no_grad():
        logits = loaded.eval()(input_ids=batch["input_ids"]).logits
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, batch["labels"][:, 1:, None])[..., 0]
    ours = streamed.evaluate([batch], return_log_probs=True).log_probs
    assert ours is not None
    torch.testing.assert_close(ours[0], wanted, rtol=1e-5, atol=1e-6)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_an_adapter_is_trained_further(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """By its name beside the base, or as the source: the same masters, in bf16 too."""
    settings = {"device": "cpu", "adapter": "lora", "lora_r": 4, "modules_to_save": ["lm_head"]}
    first = hz.HostModel.from_pretrained(bases("llama"), **settings)
    first.train_step([zoo.batch("llama")], lr=1e-2)
    first.save_pretrained(tmp_path / "tuned", dtype="float32")
    wanted = dict(first.named_parameters())
    by_name = hz.HostModel.from_pretrained(
        bases("llama"), device="cpu", adapter_name_or_path=str(tmp_path / "tuned")
    )
    as_source = hz.HostModel.from_pretrained(tmp_path / "tuned", device="cpu")
    for streamed in (by_name, as_source):
        assert differing(dict(streamed.named_parameters()), wanted) == []
        assert streamed.skeleton.units == first.skeleton.units
        out = streamed.train_step([zoo.batch("llama")], lr=1e-2)
        assert out.grad_norm > 0
    with pytest.raises(ConfigError, match="holds an adapter, not a model"):
        load(tmp_path / "tuned")
    with pytest.raises(ConfigError, match="holds an adapter, not a model"):
        model_config(TrainConfig(model_name_or_path=str(tmp_path / "tuned"), datasets="a.txt"))
    with pytest.raises(ConfigError, match="ask for another"):
        hz.HostModel.from_pretrained(tmp_path / "tuned", device="cpu", adapter="lora")


def load(folder: Path) -> Any:
    from horizon_lm.model.loading import load_model_of

    return load_model_of(folder, ModelSettings(device="cpu"))


def test_another_name_of_an_adapter(tmp_path: Path) -> None:
    """PEFT writes one that is not called default into a folder of its own; so that any program finds it, ours
    is always in the folder itself."""
    model = peft.get_peft_model(
        zoo.build("llama"), adapted("llama").peft_config["default"], adapter_name="mine"
    )
    shake(model)
    streamed = host(model)
    streamed.save_pretrained(tmp_path / "tuned")
    loaded = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "tuned")
    theirs = {k.replace(".default.", ".mine."): p for k, p in loaded.state_dict().items()}
    assert differing({PREFIX + k: v for k, v in streamed.named_parameters()}, theirs) == []


def test_another_adapter_of_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = adapted("llama")
    model.add_adapter("other", model.peft_config["default"])
    streamed = host(model)
    assert all(".default." in p.name for unit in streamed.skeleton.units for p in unit.trainable)
    assert differing(dict(streamed.named_parameters()), dict(streamed.named_parameters())) == []
    streamed.train_step([zoo.batch("llama")], lr=1e-2)
    streamed.save_pretrained(tmp_path / "tuned")
    assert {path.name for path in (tmp_path / "tuned").iterdir()} >= {"adapter_model.safetensors"}
    peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "tuned")
    sent = [name for name, _ in named_weights(streamed)]
    assert sorted(sent) == sorted(name for name, _ in zoo.build("llama").named_parameters())


# What is refused, by name.


def merged() -> Any:
    model = adapted("llama")
    model.merge_adapter()
    return model


def two_active() -> Any:
    model = adapted("llama")
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    return model


def called(name: str) -> Any:
    config = adapted("llama").peft_config["default"]
    return peft.get_peft_model(zoo.build("llama"), config, adapter_name=name)


def for_inference() -> Any:
    model = adapted("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def trained_beside() -> Any:
    model = adapted("llama")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def prompts() -> Any:
    return peft.get_peft_model(
        zoo.build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )


def vera() -> Any:
    return peft.get_peft_model(
        zoo.build("llama"), peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["up_proj"])
    )


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "prompts": (prompts, {}, "PROMPT_TUNING"),
    "shared parts": (vera, {}, "VERA"),
    "merged": (merged, {}, "merged"),
    "two active adapters": (two_active, {}, "2 active adapters"),
    "a name of the model's own": (lambda: called("mlp"), {}, "is called 'mlp'"),
    "nothing trained": (for_inference, {}, "is trained"),
    "a weight of the base": (trained_beside, {}, "norm.weight is trained too"),
    "an adapter on top": (lambda: adapted("llama"), {"adapter": "lora"}, "ask for another"),
    "the base of a PeftModel": (lambda: adapted("llama").get_base_model(), {}, "has layers of an adapter"),
    "table": (lambda: adapted("llama", modules_to_save=["embed_tokens"]), {}, "embedding table"),
    "table as a target": (lambda: adapted("llama", target_modules=["embed_tokens"]), {}, "embedding table"),
    "tied head": (lambda: adapted("llama-tied", modules_to_save=["lm_head"]), {}, "embedding table"),
    "tied head as a target": (
        lambda: adapted("llama-tied", target_modules=["lm_head"]),
        {},
        "embedding table",
    ),
    "single tokens": (
        lambda: adapted("llama", trainable_token_indices=[1, 2]),
        {},
        "trainable_token_indices",
    ),
    "no such module": (lambda: zoo.build("llama"), {"adapter": "lora", "target_modules": ["qproj"]}, "qproj"),
    "experts with dropout": (
        lambda: zoo.build("mixtral"),
        {"adapter": "lora", "lora_dropout": 0.1},
        "lora_dropout",
    ),
    "experts with dora": (lambda: zoo.build("mixtral"), {"adapter": "dora"}, "use_dora"),
    "frozen base": (
        lambda: zoo.build("llama"),
        {"adapter": "lora", "freeze": [r"base_layer"]},
        "only the base",
    ),
    "trained base": (lambda: zoo.build("llama"), {"adapter": "lora", "train": ["lm_head"]}, "only the base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(case: str) -> None:
    build, settings, words = REFUSED[case]
    with pytest.raises((ConfigError, UnsupportedModelError), match=words) as caught:
        host(build(), **settings)
    assert caught.value.hint


def test_a_second_try_does_not_nest_adapters() -> None:
    """A call that fails has put the adapter into the object already."""
    model = zoo.build("llama")
    with pytest.raises(ConfigError, match="not a unit of the model"):
        hz.HostModel.from_pretrained(model, device="cpu", adapter="lora", resident=["nothing"])
    with pytest.raises(ConfigError, match="has layers of an adapter") as caught:
        hz.HostModel.from_pretrained(model, device="cpu", adapter="lora")
    assert "load the model again" in str(caught.value.hint)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    host(adapted("llama")).save_pretrained(tmp_path / "tuned")
    with pytest.raises(HorizonError) as caught:
        host(zoo.build("gpt2"), adapter_name_or_path=str(tmp_path / "tuned"))
    assert isinstance(caught.value, (ConfigError, DataError)) and caught.value.hint
    with pytest.raises(ConfigError, match="adapter is dora"):
        host(zoo.build("llama"), adapter="dora", adapter_name_or_path=str(tmp_path / "tuned"))
    with pytest.raises(HorizonError, match="nowhere"):
        host(zoo.build("llama"), adapter_name_or_path=str(tmp_path / "nowhere"))


# `train` and `freeze`.


def names_trained(model: Any, **settings: Any) -> set[str]:
    return {p.name for unit in host(model, **settings).skeleton.units for p in unit.trainable}


def test_train_names_the_only_ones() -> None:
    model = zoo.build("llama")
    everything = {name for name, _ in model.named_parameters()}
    assert names_trained(model, train=["norm", "^lm_head"]) == {
        name for name in everything if re.search("norm|^lm_head", name)
    }
    assert names_trained(zoo.build("llama-tied"), train=["lm_head"]) == {"model.embed_tokens.weight"}
    patterns = {"train": [r"layers\.3\."], "freeze": ["embed"]}
    assert names_trained(model, **patterns) == {name for name in everything if "layers.3." in name}
    assert names_trained(model, train=[], freeze=[]) == everything


def test_they_choose_among_the_adapters_own() -> None:
    model = adapted("llama")
    everything = set(trained(model))
    assert names_trained(model, freeze=["lora_A"]) == {name for name in everything if "lora_B" in name}
    assert names_trained(model, train=[r"layers\.[01]\."]) == {
        name for name in everything if re.search(r"layers\.[01]\.", name)
    }


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"train": ["lm_hed"]}, "'lm_hed' is found in the name of no parameter"),
        ({"train": ["("]}, "not a regular expression"),
        ({"train": ["lm_head"], "freeze": ["head"]}, "both match lm_head.weight"),
        ({"train": ["norm"], "freeze": ["layernorm"]}, "both match model.layers.0.input_layernorm"),
    ],
)
def test_patterns_that_contradict_each_other(patterns: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        host(zoo.build("llama"), **patterns)
    with pytest.raises(ConfigError, match="both match"):  # by either name of a tied weight
        host(zoo.build("llama-tied"), train=["lm_head"], freeze=["embed_tokens"])


# With other settings.


def test_tiles_and_compiled_layers() -> None:
    batch = zoo.batch("llama")
    model = adapted("llama")
    plain, tiled = host(model), host(model, mlp_tile_tokens=6)
    assert tiled.forward_backward([batch]).loss == pytest.approx(
        plain.forward_backward([batch]).loss, rel=1e-6
    )
    for (name, one), (_, two) in zip(plain.named_gradients(), tiled.named_gradients(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7, msg=name)
    compiled = host(copy.deepcopy(model))
    compiled.skeleton.compile_layers(True, compiled.engine.ops, backend="aot_eager")
    assert compiled.forward_backward([batch]).loss == plain.forward_backward([batch]).loss
    assert differing(dict(compiled.named_gradients()), dict(plain.named_gradients())) == []
    assert compiled.evaluate([batch], adapter=False).loss == plain.evaluate([batch], adapter=False).loss
    assert compiled.skeleton.is_compiled(0)
