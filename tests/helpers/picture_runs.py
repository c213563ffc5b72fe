"""Runs on rows with pictures: a tiny LLaVA or Gemma 3 from random weights, its processor, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_helpers import write_rows
from horizon_lm.config import TrainConfig
from tiny_processors import PROCESSORS, pictures

ROWS = 8
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_BARE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_PIXTRAL = {"model_type": "pixtral", "image_size": 48, "patch_size": 8, "head_dim": 12}
_TOWER = {**_BARE, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False}


def model(name: str, tokenizer: Any) -> dict[str, Any]:
    """A value of init_model that fits the small processor of this name."""
    if name == "llava":
        return {
            "model_type": "llava",
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_TOWER, "patch_size": 8},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        }
    token = tokenizer.convert_tokens_to_ids
    if name == "mistral3":
        return {
            "model_type": "mistral3",
            "text_config": {"model_type": "mistral", "sliding_window": None, **_TEXT},
            "vision_config": {
                **_BARE,
                "model_type": "pixtral",
                "image_size": 48,
                "patch_size": 8,
                "head_dim": 12,
            },
            "spatial_merge_size": 2,
            "image_token_index": token("[IMG]"),
        }
    if name == "internvl":
        return {
            "model_type": "internvl",
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_BARE, "image_size": [32, 32], "patch_size": [8, 8]},
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "image_token_id": token("<IMG_CONTEXT>"),
        }
    if name.startswith("qwen"):
        return _qwen(name, token("<|image_pad|>"), token("<|video_pad|>"))
    more = {"sliding_window": 16, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
    return {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **_TEXT, **more},
        "vision_config": {**_TOWER, "patch_size": 4},
        "mm_tokens_per_image": 16,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        "boi_token_index": tokenizer.convert_tokens_to_ids("<start_of_image>"),
        "eoi_token_index": tokenizer.convert_tokens_to_ids("<end_of_image>"),
    }


def _qwen(name: str, image: int, video: int) -> dict[str, Any]:
    vision = {"hidden_size": 24, "intermediate_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    if name == "qwen2_5_vl":
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return {
        "model_type": name,
        "text_config": {**_TEXT, "rope_parameters": rope},
        "vision_config": vision,
        "image_token_id": image,
        "video_token_id": video,
    }


def rows(folder: Path, name: str = "a.jsonl", number: int = ROWS) -> list[dict[str, Any]]:
    """Rows with one picture, with two, and with none; and their files."""
    made = pictures(number)
    for i, picture in enumerate(made):
        picture.save(folder / f"{i}.png")
    found: list[dict[str, Any]] = []
    for i in range(number):
        own = [f"{i}.png", f"{(i + 1) % number}.png"][: (1, 2, 0)[i % 3]]
        asked = [*({"type": "image"} for _ in own), {"type": "text", "text": "What is in the picture?"}]
        said = [{"type": "text", "text": f"A circle and {i} squares."}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        found.append({"images": own, "messages": messages})
    write_rows(folder / name, found)
    return found


def settings(folder: Path, name: str = "llava", **changes: Any) -> TrainConfig:
    """Settings of a run in `folder`, whose data and processor are made if missing."""
    own = PROCESSORS[name]()
    if not (folder / "processor").exists():
        (own if name in ("llava", "gemma3") else own.tokenizer).save_pretrained(folder / "processor")
        rows(folder)
    values: dict[str, Any] = {
        "init_model": model(name, own.tokenizer),
        "tokenizer_name_or_path": str(folder / "processor"),
        "datasets": str(folder / "a.jsonl"),
        "eval_datasets": str(folder / "a.jsonl"),
        "dataset_cache_dir": str(folder / "cache"),
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "device": "cpu",
        "reserve_host_gb": 0.0,
        "sample_max_new_tokens": 4,
        "progress": "plain",
        "train_projector": True,
        "output_dir": str(folder / "run"),
    }
    return TrainConfig.from_dict({**values, **changes})
