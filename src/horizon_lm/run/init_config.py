"""`horizon init`: a commented configuration for a model and data, after a look at both."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import DatasetConfig, TrainConfig
from ..config_yaml import dump
from ..data import Documents, load_tokenizer
from ..data.formats import Chat, Text
from ..data.left_out import WARN_ABOVE
from ..errors import ConfigError, DataError, HorizonError
from .generate import model_folder

_LONGEST = 4096  # of a training sequence, unless the data is shorter: longer ones are for those who ask
_LOOKED_AT = 1000  # rows
_CHARACTERS_A_TOKEN = 3  # a low guess, so that few documents are longer than max_length

# What is written, by group.
_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "dtype", "attn_implementation", "device", "seed"),
    "data": (
        *("datasets", "max_length", "packing", "packing_strategy", "truncation", "loss_on", "chat_template"),
        *("on_bad_row", "val_size"),
    ),
    "batch and schedule": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps"),
    ),
    "optimizer": ("adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm"),
    "evaluation": ("eval_strategy", "eval_steps"),
    "output": ("output_dir", "logging_steps", "report_to"),
}


def write_config(model: str, datasets: Sequence[str], output: Path, *, overwrite: bool) -> list[str]:
    """Write the file and return what there is to say about it. Raises ConfigError and DataError."""
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists", hint="--overwrite, or -o FILE")
    notes = []
    name = Path(model).name
    model = str(model_folder(model, "init --model"))
    if Path(model).is_dir():  # the file may lie, and be used, elsewhere
        model = os.path.abspath(model)
    values: dict[str, Any] = {"model_name_or_path": model, "output_dir": f"runs/{name}-tuned"}
    seen = _look_at_data(datasets)
    notes.append(f"data: {seen['rows']:,} rows looked at, format {', '.join(seen['formats'])}")
    values["datasets"] = [
        {"path": path, "format": format} for path, format in zip(datasets, seen["formats"], strict=True)
    ]
    limit = _longest_position(model)
    values["max_length"] = _length(seen, limit)
    notes += _about_long_rows(seen, values["max_length"])
    if seen["rows"] >= 100:
        values["val_size"] = 0.05
        values["eval_strategy"] = "steps"
    if seen["is_chat"]:
        template = _template_for(model)
        values["chat_template"] = template
        if template is not None:
            notes.append(
                "the tokenizer has no chat template: 'plain' is written down; chatml and alpaca are others"
            )
    values.update(_batch(values["max_length"], is_text=not seen["is_chat"]))
    text = _text(values)
    config = TrainConfig.from_dict(values)  # what is written is valid
    assert config.datasets
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}", hint="-o FILE") from error
    return [
        *notes,
        f"written: {output}",
        f"next: horizon data preview {output}",
        f"      horizon train {output}",
    ]


def _look_at_data(datasets: Sequence[str]) -> dict[str, Any]:
    formats, rows, longest, is_chat = [], 0, 0, False
    sizes: list[int] = []  # of what is not split where it is too long
    for path in datasets:
        documents = Documents([DatasetConfig(path=path)])
        found = 0
        for placed in islice(documents, _LOOKED_AT):
            found += 1
            is_chat = is_chat or isinstance(placed.example, Chat)
            size = len(json.dumps(placed.example.__dict__, default=str, ensure_ascii=False))
            longest = max(longest, size)
            if not isinstance(placed.example, Text):
                sizes.append(size)
        if not found:
            raise DataError(f"{path} holds no row", hint="horizon data preview shows why")
        formats.append(str(documents.formats[0]))
        rows += found
    return {"formats": formats, "rows": rows, "longest": longest, "is_chat": is_chat, "sizes": sizes}


def _about_long_rows(seen: dict[str, Any], max_length: int) -> list[str]:
    """How many rows will be left out, by a guess at their tokens; the preview counts them."""
    sizes = seen["sizes"]
    long = sum(size > max_length * _CHARACTERS_A_TOKEN for size in sizes)
    if not long:
        return []
    share = long / len(sizes)
    return [
        f"{'warning: ' if share > WARN_ABOVE else ''}{long:,} of {len(sizes):,} rows ({share:.1%}) may be "
        f"longer than max_length={max_length} and would be left out; truncation=keep_start cuts them"
    ]


def _longest_position(model: str) -> int:
    """max_position_embeddings of a local model; else the limit that we set."""
    try:
        values = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        text = values.get("text_config", values)
        return int(text.get("max_position_embeddings") or _LONGEST)
    except (OSError, ValueError, AttributeError, TypeError):
        return _LONGEST


def _length(seen: dict[str, Any], limit: int) -> int:
    """As long as the data needs, a power of two, within what model and reason allow."""
    wanted = max(256, seen["longest"] // _CHARACTERS_A_TOKEN) if seen["is_chat"] else _LONGEST
    return min(1 << (wanted - 1).bit_length(), limit, _LONGEST)


def _template_for(model: str) -> str | None:
    try:
        tokenizer = load_tokenizer(model)
    except HorizonError:
        return None  # not at hand: its own template is what will be used, if it has one
    return None if tokenizer.chat_template else "plain"


def _batch(max_length: int, *, is_text: bool) -> dict[str, Any]:
    """About 16 k tokens a step for tuning and 64 k for text, in micro-batches of about 4 k."""
    rows = max(1, 4096 // max_length)
    tokens = 65536 if is_text else 16384
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": max(1, tokens // (rows * max_length)),
        "num_train_epochs": 1 if is_text else 3,
        "adam_beta2": 0.95 if is_text else 0.999,
    }


def _text(values: dict[str, Any]) -> str:
    lines = [
        "# Written by `horizon init`. Every key may be changed here or on the command line (key=value);",
        "# `horizon train --help` lists those that are not here.",
    ]
    for group, keys in _KEYS.items():
        lines += ["", f"# -- {group}"]
        for key in keys:
            field = TrainConfig.model_fields[key]
            value = values.get(key, field.get_default(call_default_factory=True))
            written = dump({key: value}).rstrip("\n").split("\n")
            lines.append(f"{written[0]:<34} # {_short(field.description)}")
            for inner in written[1:]:
                name = inner.strip("- ").split(":")[0]
                lines.append(f"{inner:<34} # {_short(DatasetConfig.model_fields[name].description)}")
    return "\n".join(lines) + "\n"


def _short(description: str | None) -> str:
    """The first clause of what a setting means, as a comment begins."""
    clause = re.split(r"[;:.] |[.;]$", str(description))[0]
    return clause[:1].lower() + clause[1:]
