"""Combinations of adapters, frozen and packed parts that cannot work are refused by name, with a way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

import horizon_lm as hz
import peft_models
import vision_zoo
import zoo
from horizon_lm import cli
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.data.picture_checks import processor_of
from horizon_lm.engine.homes import Homes
from horizon_lm.errors import ConfigError, DataError, HorizonError, UnsupportedModelError
from trainer_pairs import build, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """run: what is refused, given a folder with an `adapter` of the zoo's llama and the model itself, `base`.
    says: parts of the message, what and value. hint: part of the way out."""

    run: Callable[[Path], object]
    says: tuple[str, ...]
    hint: str
    error: type[HorizonError] = ConfigError


def asked(**settings: Any) -> Callable[[Path], object]:
    """Settings of a run."""
    values = {"model_name_or_path": "m", "datasets": "d", **settings}
    return lambda _: TrainConfig.from_dict({key: v for key, v in values.items() if v is not None})


def host(model: Any = None, **settings: Any) -> Callable[[Path], object]:
    """A HostModel. model: makes it from the folder; the zoo's llama by default."""

    def run(place: Path) -> object:
        found = zoo.build("llama") if model is None else model(place)
        values = {
            key: str(value).replace("PLACE", str(place)) if isinstance(value, str) else value
            for key, value in settings.items()
        }
        return hz.HostModel.from_pretrained(found, device="cpu", dtype="float32", **values)

    return run


def of_ranks(**settings: Any) -> Callable[[Path], object]:
    """Where the parts of the zoo's llama are to be on two ranks."""

    def run(_: Path) -> object:
        with hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", adapter="lora") as model:
            return Homes.of(ModelSettings(device="cpu", **settings), model.skeleton, 2)

    return run


def saved(place: Path) -> object:
    model: Any = host(freeze=["mlp"], base_dtype="int8")(place)
    with model:
        return model.save_pretrained(place / "out")


def given(**config: Any) -> Callable[[Path], Any]:
    """A PeftModel."""
    return lambda _: peft_models.adapted("llama", **config)


def prompts(_: Path) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(zoo.build("llama"), config)


def two(_: Path) -> Any:
    model = peft_models.adapted("llama")
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(_: Path) -> Any:
    model = peft_models.adapted("llama")
    model.merge_adapter()
    return model


def changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    """A HostModel that trains the adapter further, whose weights are changed."""

    def run(place: Path) -> object:
        file = place / "adapter" / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
        return host(adapter_name_or_path="PLACE/adapter")(place)

    return run


def pickled(place: Path) -> object:
    (place / "adapter" / "adapter_model.safetensors").rename(place / "adapter" / "adapter_model.bin")
    return host(adapter_name_or_path="PLACE/adapter")(place)


def cut(place: Path) -> object:
    file = place / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return host(adapter_name_or_path="PLACE/adapter")(place)


def trainer(method: str = "sft", **arguments: Any) -> Callable[[Path], object]:
    """A trainer. arguments: those of its constructor, made from the folder if they are functions."""

    def run(place: Path) -> object:
        found = {key: value(place) if callable(value) else value for key, value in arguments.items()}
        return build(method, "llama", place / "run", ours=True, trainer=found)

    return run


def config(place: Path) -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


CASES: dict[str, Case] = {
    # Settings.
    "an adapter on random weights": Case(
        asked(adapter="lora", model_name_or_path=None, init_model={"model_type": "llama"}),
        ("adapter", "init_model"),
        "model_name_or_path",
    ),
    "lora_r without an adapter": Case(
        asked(lora_r=8), ("lora_r has no effect with adapter: none",), "adapter=lora"
    ),
    "target_modules without an adapter": Case(
        asked(target_modules=["q_proj"]), ("target_modules has no effect with adapter: none",), "adapter=lora"
    ),
    "modules_to_save without an adapter": Case(
        asked(modules_to_save=["lm_head"], freeze=["mlp"]), ("modules_to_save has no effect",), "adapter=lora"
    ),
    "lora_alpha of a saved adapter": Case(
        asked(adapter_name_or_path="a", lora_alpha=8.0),
        ("lora_alpha has no effect with adapter_name_or_path",),
        "leave the key out",
    ),
    "dropout on preferences": Case(
        asked(adapter="lora", lora_dropout=0.1, method="dpo"),
        ("lora_dropout has no effect with method: dpo",),
        "leave the key out",
    ),
    "new tokens": Case(asked(adapter="lora", new_tokens=["<a>"]), ("new_tokens", "adapter"), "adapter: none"),
    "random weights under an adapter": Case(
        asked(adapter="dora", allow_missing=["lm_head"]), ("allow_missing", "adapter"), "leave the key out"
    ),
    "a packed model that is trained whole": Case(
        asked(base_dtype="nf4"), ("base_dtype: nf4", "all weights are trained"), "adapter=lora"
    ),
    "a cache of what is not packed": Case(
        asked(adapter="lora", base_cache_dir="c"), ("base_cache_dir", "base_dtype: auto"), "base_dtype=int8"
    ),
    "an unknown adapter": Case(
        asked(adapter="loha"), ("adapter is loha", "none | lora | dora"), "did you mean 'lora'"
    ),
    "rollouts from the command": Case(asked(rl="grpo"), ("rl is 'grpo'", "rollouts"), "method"),
    "single tokens by their setting": Case(
        asked(trainable_token_indices=[1]), ("unknown key 'trainable_token_indices'",), "modules_to_save"
    ),
    # Models.
    "an adapter on an adapter": Case(
        host(given(), adapter="lora"),
        ("PeftModelForCausalLM has an adapter", "another"),
        "pass the base model",
    ),
    "prompts": Case(host(prompts), ("PROMPT_TUNING",), "lora", UnsupportedModelError),
    "two adapters": Case(
        host(two), ("2 active adapters", "default, second"), "set_adapter", UnsupportedModelError
    ),
    "a merged adapter": Case(host(merged), ("merged",), "unmerge_adapter()", UnsupportedModelError),
    "single tokens": Case(
        host(given(trainable_token_indices=[1, 2])),
        ("trainable_token_indices",),
        "modules_to_save",
        UnsupportedModelError,
    ),
    "a start that changes the base": Case(
        host(given(init_lora_weights="pissa_niter_2")),
        ("init_lora_weights='pissa_niter_2'",),
        "init_lora_weights=True",
        UnsupportedModelError,
    ),
    "biases of the base": Case(
        host(given(bias="lora_only")), ("bias='lora_only'",), "bias='none'", UnsupportedModelError
    ),
    "the embedding table": Case(
        host(adapter="lora", modules_to_save=["embed_tokens"]),
        ("embedding table",),
        "modules_to_save",
        UnsupportedModelError,
    ),
    "no such target": Case(
        host(adapter="lora", target_modules=["q_proj", "qproj"]),
        ("target_modules: 'qproj'",),
        "the nearest names are q_proj",
    ),
    "no such module to save": Case(
        host(adapter="lora", modules_to_save=["lmhead"]),
        ("modules_to_save: 'lmhead'",),
        "the nearest names are lm_head",
    ),
    "train of the base": Case(
        host(adapter="lora", train=["lm_head"]),
        ("train: 'lm_head'", "frozen under an adapter"),
        "modules_to_save",
    ),
    "a base without an adapter": Case(
        lambda _: hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32").evaluate(
            [zoo.batch("llama")], adapter=False
        ),
        ("no adapter",),
        "adapter=False",
    ),
    # Packed parts.
    "a whole model, packed": Case(
        host(base_dtype="nf4"), ("base_dtype=nf4", "none are frozen"), "set adapter=lora"
    ),
    "a packed base in an exact reduction": Case(
        host(adapter="lora", base_dtype="int8", reduction="exact"),
        ("base_dtype=int8", "reduction=exact"),
        "leave base_dtype out",
    ),
    "a packed base on two ranks": Case(
        of_ranks(adapter="lora", base_dtype="nf4"), ("base_dtype=nf4", "2 ranks"), "leave base_dtype out"
    ),
    "trainable parts apart on two ranks": Case(
        of_ranks(adapter="lora", resident="trainable"), ("resident", "trainable"), "resident"
    ),
    "a base in less than the model's dtype": Case(
        host(adapter="lora", base_dtype="bfloat16"),
        ("base_dtype=bfloat16", "dtype=float32"),
        "dtype=bfloat16",
    ),
    "a packed model, saved": Case(
        lambda place: saved(place), ("base_dtype=int8", "frozen weights"), "adapter: lora"
    ),
    # Pictures.
    "a projector in a model of text": Case(
        host(train_projector=True), ("train_projector: llama has no projector",), "leave it out"
    ),
    "a projector under an adapter": Case(
        host(lambda _: vision_zoo.build("llava"), adapter="lora", train_projector=True),
        ("train_projector", "adapter"),
        "modules_to_save",
    ),
    "projectors between the layers": Case(
        host(lambda _: vision_zoo.build("qwen3_vl"), train_projector=True),
        ("train_projector", "qwen3_vl", "several projectors"),
        "leave it out",
    ),
    "an adapter of the tower": Case(
        host(lambda _: vision_zoo.build("llava"), adapter="lora", target_modules=["fc1", "q_proj"]),
        ("target_modules: 'fc1'",),
        "language model",
    ),
    "pictures for a model of text": Case(
        lambda place: processor_of(asked(model_name_or_path=str(place / "base"))(place), None, "rows:1"),
        ("rows:1 has pictures", "base has no processor"),
        "choose a vision-language model",
    ),
    "pictures for a trainer": Case(
        trainer(train_dataset=lambda _: Dataset.from_dict({"text": ["a"], "images": [["a.png"]]})),
        ("train_dataset with pictures",),
        "remove the columns",
    ),
    # Files.
    "another kind than the folder's": Case(
        host(adapter="dora", adapter_name_or_path="PLACE/adapter"),
        ("adapter is dora", "PLACE/adapter", "lora adapter"),
        "leave adapter out",
    ),
    "pickled weights": Case(pickled, ("PLACE/adapter", "adapter_model.safetensors"), "never loaded"),
    "a damaged adapter": Case(cut, ("PLACE/adapter", "damaged"), "again", DataError),
    "an adapter of wider layers": Case(
        changed(lambda weights: {name: value.repeat(1, 2) for name, value in weights.items()}),
        ("PLACE/adapter", "does not fit the model"),
        "name the model that it was trained on",
        DataError,
    ),
    "an adapter of other layers": Case(
        changed(lambda weights: {name.replace("layers.0", "layers.9"): v for name, v in weights.items()}),
        ("PLACE/adapter", "does not fit the model"),
        "name the model that it was trained on",
        DataError,
    ),
    "a folder of an adapter as a model with another": Case(
        host(lambda place: place / "adapter", adapter="lora"),
        ("PLACE/adapter", "holds an adapter", "another"),
        "name the base model",
    ),
    "a merge without an adapter": Case(
        lambda place: cli.run.export(str(place / "base"), str(place / "out"), merge=True),
        ("PLACE/base", "no adapter to merge"),
        "--merge",
    ),
    # Trainers.
    "peft_config with a HostModel": Case(
        trainer(model=host(), peft_config=config), ("peft_config with a HostModel",), "adapter='lora'"
    ),
    "peft_config with a PeftModel": Case(
        trainer(model=given(), peft_config=config), ("peft_config with a PeftModel",), "merge_and_unload"
    ),
    "peft_config of prompts": Case(
        trainer(peft_config=lambda _: peft.PromptTuningConfig(num_virtual_tokens=2)),
        ("peft_config", "PROMPT_TUNING"),
        "LoraConfig",
    ),
    "a dict as peft_config": Case(
        trainer(peft_config=lambda _: {"r": 2}), ("dict as peft_config",), "LoraConfig"
    ),
    "peft_config without a match": Case(
        trainer(peft_config=lambda _: peft.LoraConfig(target_modules=["nothing"])),
        ("PEFT refuses peft_config", "nothing"),
        "target_modules",
    ),
    "adapters of transformers": Case(
        trainer(model=lambda place: own_adapter(place)), ("adapters of add_adapter()",), "get_peft_model"
    ),
}


def own_adapter(place: Path) -> Any:
    model = small_model("llama")
    model.add_adapter(config(place))
    return model


@pytest.fixture
def place(tmp_path: Path) -> Path:
    peft_models.adapted("llama", target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
    zoo.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_combination_is_refused_by_name(case: str, place: Path) -> None:
    expected = CASES[case]
    with pytest.raises(HorizonError) as caught:
        expected.run(place)
    assert type(caught.value) is expected.error
    for part in expected.says:
        assert part.replace("PLACE", str(place)) in caught.value.message, caught.value.message
    assert caught.value.hint and expected.hint in caught.value.hint, caught.value.hint


def test_there_are_twenty() -> None:
    assert len(CASES) >= 20


ACCEPTED: dict[str, Callable[[Path], object]] = {
    "an adapter": asked(adapter="lora", lora_r=8, lora_dropout=0.1, modules_to_save=["lm_head"]),
    "a saved adapter on preferences": asked(adapter_name_or_path="a", method="dpo"),
    "a packed base": asked(adapter="dora", base_dtype="nf4", base_cache_dir="c"),
    "a packed frozen part": asked(freeze=["mlp"], base_dtype="int8"),
    "a model": host(adapter="lora", target_modules=["q_proj"], modules_to_save=["lm_head"], lora_r=2),
    "a PeftModel": host(given()),
    "the folder": host(adapter_name_or_path="PLACE/adapter"),
    "peft_config": trainer(peft_config=config),
    "a trainer's PeftModel": trainer("dpo", model=given()),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_is_accepted(case: str, place: Path) -> None:
    """The control."""
    ACCEPTED[case](place)
