"""Tiny vision-language models of six families, and micro-batches with pictures for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers

VOCAB, PICTURE, WIDTH = 96, 90, 32
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config=_TOWER | vision,
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **_TEXT},
        vision_config=_TOWER | {"model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 12},
        image_token_index=PICTURE,
        spatial_merge_size=2,
    )


def _gemma3() -> Any:
    vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4}
    text = _TEXT | {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}
    return transformers.Gemma3Config(
        text_config={"model_type": "gemma3_text", **text},
        vision_config=_TOWER | vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB + 3,  # beyond the table of embeddings
    )


def _qwen2_5_vl() -> Any:
    vision = {"hidden_size": 24, "intermediate_size": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1]}
    return transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": _MROPE},
        vision_config=vision,
        image_token_id=PICTURE,
    )


def _qwen3_vl() -> Any:
    vision = {"hidden_size": 24, "intermediate_size": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": _MROPE},
        vision_config=vision,
        image_token_id=PICTURE,
    )


def _internvl() -> Any:
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        vision_config=_TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=PICTURE,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )


@dataclass(frozen=True)
class Family:
    """config: of the model. sizes: (height, width) in pixels of the images of its micro-batches."""

    config: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]


_ONE_SIZE = ((16, 16),) * 4
_SIZES = ((16, 16), (8, 24), (24, 16), (8, 8))
FAMILIES = {
    "llava": Family(_llava, ((8, 8),) * 4),
    "mistral3": Family(_mistral3, _SIZES),
    "gemma3": Family(_gemma3, _ONE_SIZE),
    "qwen2_5_vl": Family(_qwen2_5_vl, ((40, 24), (8, 24), (24, 40), (8, 8))),
    "qwen3_vl": Family(_qwen3_vl, _SIZES),
    "internvl": Family(_internvl, _ONE_SIZE),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with random weights, in training mode; changes: of its language model's configuration."""
    config = FAMILIES[name].config()
    for key, value in changes.items():
        setattr(config.text_config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases that are not constant
                parameter.add_(0.02 * torch.randn_like(parameter))
            projector = getattr(model.model, "multi_modal_projector", None)
            if hasattr(projector, "mm_input_projection_weight"):
                projector.mm_input_projection_weight.normal_(std=0.2)
    return model.to(dtype).train()


@cache
def placeholder(name: str) -> int:
    return int(FAMILIES[name].config().image_token_id)


def pixels(name: str, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """A processor's outputs for images of these numbers, which choose content and size."""
    sizes = [FAMILIES[name].sizes[number % 4] for number in numbers]
    images = [
        torch.randn(3, *size, generator=torch.Generator().manual_seed(number))
        for number, size in zip(numbers, sizes, strict=True)
    ]
    if name.startswith("qwen"):
        patches = [_qwen_patches(image) for image in images]
        grid = torch.tensor([[1, height // 4, width // 4] for height, width in sizes])
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}
    if name != "mistral3":
        return {"pixel_values": torch.stack(images)}
    most = [max(size[i] for size in sizes) for i in (0, 1)]
    padded = torch.zeros(len(images), 3, *most)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return {"pixel_values": padded, "image_sizes": torch.tensor(sizes)}


def _qwen_patches(image: torch.Tensor) -> torch.Tensor:
    """[patches, 3 * 2 * 4 * 4] of an image [3, height, width], 2 x 2 patches after one another."""
    height, width = image.shape[1] // 4, image.shape[2] // 4
    frames = image.expand(2, *image.shape)
    cut = frames.reshape(1, 2, 3, height // 2, 2, 4, width // 2, 2, 4)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(height * width, 3 * 2 * 4 * 4)


@cache
def tokens(name: str, number: int) -> int:
    """Placeholders of the image of this number."""
    height, width = FAMILIES[name].sizes[number % 4]
    return 4 if name in ("llava", "gemma3", "internvl") else height // 8 * (width // 8)


# Models that tell pictures apart by what is between their placeholders.
_KEPT_APART = ("gemma3", "qwen2_5_vl", "qwen3_vl")


def batch(
    name: str, rows: Sequence[Sequence[int]], *, length: int = 64, seed: int = 1, padded: bool = False
) -> dict[str, torch.Tensor]:
    """input_ids, labels and token types of rows with the images of these numbers, several in a row.

    padded: rows end in padding of different lengths. Placeholders are no targets.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (len(rows), length), generator=generator)
    token = placeholder(name)
    for row, images in zip(ids, rows, strict=True):
        place = 2
        for i, number in enumerate(images):
            end = place + tokens(name, number)
            row[place:end] = token
            place = end + (0 if i % 2 and name not in _KEPT_APART else 2)
        assert place <= length - 8
    labels = ids.masked_fill(ids == token, -100)
    found = {"input_ids": ids, "labels": labels}
    if padded:
        mask = torch.ones_like(ids)
        for row in range(len(rows)):
            mask[row, length - 3 * row :] = 0
        found |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
        found["input_ids"] = ids.masked_fill(mask == 0, 0)
    types = (ids == token).long()
    if name == "gemma3":
        found["token_type_ids"] = types
    if name.startswith("qwen"):
        found["mm_token_type_ids"] = types
    return found
