"""The model card: base model, data, settings, versions.

Local paths are cut to their last part; names are escaped, so that none acts as Markdown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from horizon_lm.text import code_span, markdown, redact
from horizon_lm.words import count

_SHOWN = (
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "loss_on"),
    *("num_train_epochs", "max_steps", "dtype", "moment_dtype", "seed"),
)

_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
_PREFERENCES = ("method", "loss_type", "beta", "ref_model_name_or_path")  # shown for methods on these

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # names that the Hub accepts as a base model

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ what }}

## Data

{{ data }}

## Settings

{{ table }}

## Made with

{{ versions }}
"""


def _sees(model_type: str) -> bool:
    """Whether models of this type are loaded as vision-language models."""
    from transformers.models.auto import modeling_auto as auto

    kind = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    return kind is not None and auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, kind) == kind


class Part(NamedTuple):
    """Which part of the base was trained, in words, and how it is stored: the library that reads it."""

    what: str
    library: str = "transformers"
    tags: tuple[str, ...] = ()


WHOLE = Part("All parameters")


def adapter_part(words: str, *, is_merged: bool = False) -> Part:
    """Return the part of an adapter. words: such as "lora r=16". is_merged: it was added to the weights."""
    kind = words.partition(" ")[0]
    if is_merged:
        return Part(f"An adapter ({markdown(words)}), added to the weights", tags=(kind,))
    return Part(f"An adapter ({markdown(words)})", "peft", (kind,))


def model_card(
    config: dict[str, Any],
    *,
    model_type: str,
    step: int,
    num_tokens: int | None,
    versions: dict[str, str],
    part: Part = WHOLE,
) -> str:
    """Return the text of README.md. config: the resolved settings."""
    from huggingface_hub import ModelCard, ModelCardData

    base = _public(config.get("model_name_or_path"))
    origin = code_span(base) if base else f"random weights ({markdown(model_type)})"
    tokens = f" on {count(num_tokens, 'token')}" if num_tokens else ""
    data = [f"- {markdown(_public(entry['path']) or '')}" for entry in config.get("datasets", [])]
    method = config.get("method", "sft")
    is_preference = method not in ("auto", "sft")
    has_settings = part != WHOLE and config.get("adapter_name_or_path") is None
    shown = [*(_ADAPTER if has_settings else ()), *(_PREFERENCES if is_preference else ()), *_SHOWN]
    values = {**config, "ref_model_name_or_path": _public(config.get("ref_model_name_or_path"))}
    rows = [f"| {key} | {markdown(str(values[key]))} |" for key in shown if key in config]
    how = f" on preferences, method: {method}," if is_preference else ""
    card_data = ModelCardData(
        base_model=base if base and _REPOSITORY.fullmatch(base) else None,
        library_name=part.library,
        pipeline_tag="image-text-to-text" if _sees(model_type) else "text-generation",
        tags=["horizon-lm", *part.tags, *([method] if is_preference else [])],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        name=markdown(_public(config.get("run_name")) or Path(str(config.get("output_dir", "model"))).name),
        what=f"{part.what} of {origin}, trained{how} for {count(step, 'step')}{tokens} with horizon-lm.",
        data="\n".join(data) or "Not recorded.",
        table="\n".join(["| setting | value |", "| --- | --- |", *rows]),
        versions="\n".join(f"- {name} {version}" for name, version in versions.items()),
    )
    return str(card)


def _public(name: str | None) -> str | None:
    """Keep a name on the Hub; cut a local path to its last part."""
    if name is None:
        return None
    name = redact(name)
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()
    return Path(name).name if is_path else name
