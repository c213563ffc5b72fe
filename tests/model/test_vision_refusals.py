"""What cannot be trained with pictures is refused by name, before anything is computed or updated."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import horizon_lm as hz
import vision_zoo as vision
import zoo
from horizon_lm.errors import ConfigError, DataError, HorizonError, UnsupportedModelError
from horizon_lm.model.pictures import picture_inputs, vision_modules
from plain_gradients import stream

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = dict[str, Any]


@cache
def host_of(name: str) -> hz.HostModel:
    return stream(vision.build(name))


@cache
def features_of(name: str) -> list[dict[str, torch.Tensor]]:
    return host_of(name).encode_images(vision.pixels(name, [0, 1]))


def batch(name: str) -> Batch:
    """A micro-batch with two images, one in each row."""
    sizes = {key: v for key, v in vision.pixels(name, [0, 1]).items() if key != "pixel_values"}
    return vision.batch(name, [[0], [1]]) | sizes | {"image_features": list(features_of(name))}


def without(*names: str) -> Callable[[Batch], Batch]:
    return lambda given: {key: value for key, value in given.items() if key not in names}


def and_more(**more: Any) -> Callable[[Batch], Batch]:
    return lambda given: given | more


def packed(given: Batch) -> Batch:
    positions = torch.arange(64).expand(2, 64).clone()
    positions[:, 40:] -= 40
    return given | {"position_ids": positions}


def features(change: Callable[[list[dict[str, torch.Tensor]]], Any]) -> Callable[[Batch], Batch]:
    return lambda given: given | {"image_features": change(given["image_features"])}


def renamed(images: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [images[0], {"feature": images[1]["features"]}]


CASES: dict[str, tuple[str, Callable[[Batch], Batch], str]] = {
    "no features": (
        "llava",
        without("image_features"),
        "has 8 placeholders of pictures (token 90) and no ima",
    ),
    "an image too few": (
        "llava",
        features(lambda f: f[:1]),
        "has 8 placeholders of pictures (token 90), its",
    ),
    "an image too many": ("gemma3", features(lambda f: [*f, f[0]]), "are of 12 tokens in 3 images"),
    "no list": ("llava", features(lambda f: f[0]["features"]), "is a Tensor, not a list with an entry per"),
    "no features in an entry": ("llava", features(renamed), "image_features[1] has no features"),
    "unlike entries": (
        "qwen3_vl",
        features(lambda f: [f[0], {"features": f[1]["features"]}]),
        "image_features[1] holds ['features'], the first image ['deepstack_0', 'deepstack_1', 'features']",
    ),
    "of another model": (
        "internvl",
        features(lambda f: [f[0], {"features": f[1]["features"][:, :8]}]),
        "features of shape (4, 8), the first image's of (4, 32)",
    ),
    "pixels as well": (
        "llava",
        and_more(pixel_values=torch.zeros(2, 3, 8, 8)),
        "has both image_features and",
    ),
    "videos": (
        "qwen2_5_vl",
        and_more(pixel_values_videos=torch.zeros(8, 96)),
        "holds videos (pixel_values_vi",
    ),
    "sound": (
        "gemma3",
        and_more(input_features=torch.zeros(1, 8)),
        "holds sound (input_features), which are",
    ),
    "packed": ("llava", packed, "packs documents with pictures into one row (position_ids begin again)"),
    "packed, with positions of its own": ("qwen3_vl", packed, "packs documents with pictures into one row"),
    "position_ids": (
        "qwen2_5_vl",
        and_more(position_ids=torch.arange(64).expand(2, 64)),
        "has position_ids and pictures, whose positions the model computes itself",
    ),
    "no token types": ("gemma3", without("token_type_ids"), "has pictures and no token_type_ids"),
    "no sizes": ("qwen2_5_vl", without("image_grid_thw"), "has pictures and no image_grid_thw"),
    "sizes of another number": (
        "qwen3_vl",
        and_more(image_grid_thw=torch.ones(3, 3, dtype=torch.long)),
        "image_grid_thw of 3 images, image_features of 2",
    ),
    "token types of another shape": (
        "gemma3",
        and_more(token_type_ids=torch.zeros(2, 8, dtype=torch.long)),
        "token_type_ids of shape (2, 8), input_ids of (2, 64)",
    ),
    "a token beyond the vocabulary": (
        "gemma3",
        lambda given: given | {"input_ids": given["input_ids"].masked_fill(given["input_ids"] == 9, 98)},
        "input_ids hold 98, outside the vocabulary of 96",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_micro_batch_is_refused(case: str) -> None:
    name, change, reason = CASES[case]
    host = host_of(name)
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        host.forward_backward([change(batch(name))])
    assert "hint: " in str(caught.value)
    host.forward_backward([batch(name)])  # negative control


def test_a_model_of_text_takes_no_pictures() -> None:
    host = stream(zoo.build("llama"))
    with pytest.raises(DataError, match="unknown keys \\['image_features'\\]"):
        host.forward_backward([zoo.batch("llama") | {"image_features": features_of("llava")}])
    with pytest.raises(ConfigError, match="llama is a text-only model"):
        host.encode_images(vision.pixels("llava", [0]))
    assert vision_modules(host.skeleton.model) == () and picture_inputs(host.config) is None


def test_encoding_refuses_what_it_cannot_encode() -> None:
    with pytest.raises(DataError, match="encode_images\\(\\): no pixel_values"):
        host_of("llava").encode_images({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(DataError, match="encode_images\\(\\) holds videos"):
        host_of("qwen3_vl").encode_images({"pixel_values_videos": torch.zeros(8, 96)})


def test_a_tower_with_dropout_is_refused() -> None:
    config = vision.FAMILIES["llava"].config()
    config.vision_config.attention_dropout = 0.1
    host = hz.HostModel.from_config(config, device="cpu", dtype="float32", skip_memory_check=True)
    with pytest.raises(UnsupportedModelError, match="llava .*vision tower draws random numbers"):
        host.encode_images(vision.pixels("llava", [0]))
    host.forward_backward([vision.batch("llava", [[], []])])  # text alone does not run it


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "train the tower": (
        "llava",
        {"train": ["vision_tower"]},
        "train: 'vision_tower' matches model.vision_tower",
    ),
    "train what the tower has too": (
        "gemma3",
        {"train": ["self_attn"]},
        "'self_attn' matches model.vision_tow",
    ),
    "train the projector": (
        "llava",
        {"train": ["projector"]},
        "matches model.multi_modal_projector.linear_1.b",
    ),
    "train and freeze the projector": (
        "internvl",
        {"freeze": ["linear_1"], "train_projector": True},
        "freeze: 'linear_1' matches model.multi_modal_projector.linear_1",
    ),
    "nothing but the tower": (
        "llava",
        {"freeze": ["language_model", "lm_head"]},
        "no parameter is left to tr",
    ),
    "several projectors": (
        "qwen3_vl",
        {"train_projector": True},
        "the tower of qwen3_vl has several projectors, between its layers (model.visual.deepstack_",
    ),
    "a projector and an adapter": (
        "llava",
        {"train_projector": True, "adapter": "lora"},
        "an adapter is saved without them",
    ),
    "an adapter of the tower": (
        "llava",
        {"adapter": "lora", "modules_to_save": ["vision_tower"]},
        "the adapter would train model.vision_tower",
    ),
    "an adapter of nothing else": (
        "qwen2_5_vl",
        {"adapter": "lora", "target_modules": ["linear_fc1", "attn.qkv"]},
        "PEFT refuses the adapter",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_would_train_the_tower_are_refused(case: str) -> None:
    name, settings, reason = SETTINGS[case]
    with pytest.raises(HorizonError, match=re.escape(reason)) as caught:
        stream(vision.build(name), **settings)
    assert "hint: " in str(caught.value)


def test_a_model_of_text_has_no_projector() -> None:
    with pytest.raises(ConfigError, match="train_projector: llama has no projector"):
        stream(zoo.build("llama"), train_projector=True)


def test_patterns_for_the_language_model_are_taken() -> None:
    """Negative control of the refusals above."""
    host = stream(vision.build("gemma3"), train=["language_model.*self_attn"])
    trained = [p.name for unit in host.skeleton.units for p in unit.trainable]
    assert trained and all("language_model" in name and "self_attn" in name for name in trained)
    host = stream(vision.build("gemma3"), train=["lm_head", "projector"], train_projector=True)
    assert {p.name.split(".")[1] for p in host.skeleton.units[0].trainable} == {"multi_modal_projector"}
    host.forward_backward(
        [batch("gemma3") | {"image_features": host.encode_images(vision.pixels("gemma3", [0, 1]))}]
    )


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_inputs_of_each_family(name: str) -> None:
    """What a processor returns that the model takes, from the configuration alone."""
    found = picture_inputs(vision.FAMILIES[name].config())
    assert found == host_of(name).skeleton.picture_inputs
    assert found is not None and found.placeholder == vision.placeholder(name)
    assert found.pixels == ("pixel_values",)
    assert found.makes_positions == name.startswith("qwen")
    assert set(vision.pixels(name, [0])) <= {*found.pixels, *found.per_image}
