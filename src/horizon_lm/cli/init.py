"""`horizon init`: a commented configuration for a model and data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from horizon_lm.cli.run import split_arguments
from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import REPLACES, collect, keys_of
from horizon_lm.config.preference import DataKind
from horizon_lm.config.yaml import dump
from horizon_lm.data import Documents, load_tokenizer, load_training_data
from horizon_lm.data.documents import METHODS, two_kinds
from horizon_lm.data.examples import Chat, Example, Text, sides, texts
from horizon_lm.data.formats import kind_of
from horizon_lm.data.pictures import Picture, open_picture
from horizon_lm.data.preview import WARN_ABOVE
from horizon_lm.data.processor import load_processor
from horizon_lm.errors import ConfigError, DataError, HorizonError
from horizon_lm.io import files
from horizon_lm.io.hub import require_reachable
from horizon_lm.plan.step_size import usual_cut
from horizon_lm.training.generate import model_folder
from horizon_lm.words import count

_LONGEST = 4096  # tokens of a training sequence; longer ones only if the user asks
_LOOKED_AT = 1000  # rows of a dataset, for its format and longest row
_COUNTED_ROWS, _COUNTED_CHARACTERS = 50_000, 20_000_000  # beyond: large data
_TOKENISED_CHARACTERS = 2_000_000  # beyond, tokens are estimated from characters
_PICTURE_TOKENS = 576  # of a picture, if the processor cannot tell
_CHARACTERS_A_TOKEN = 3  # a low estimate, so that few documents exceed max_length
_PREFERENCES = {"beta": 0.1, "learning_rate": 1e-6}  # TRL's defaults for DPO and KTO
_OF_ADAPTERS = {
    "documents": 2e-4,
    "pairs": 1e-5,
    "labelled": 1e-5,
}  # learning_rate: ten times a full run's and more
_NOUNS = {"documents": "row", "pairs": "pair", "labelled": "sample"}

# The keys written, by group, and those that a kind of data has no use for.
_OMITTED: dict[DataKind, tuple[str, ...]] = {
    "documents": ("method", "beta"),
    "pairs": ("loss_on",),
    "labelled": ("loss_on", "packing", "packing_strategy"),
}
_WITH_PICTURES, _WITHOUT = ("packing", "packing_strategy"), ("on_bad_image",)  # further ones
_OF_ARGUMENTS = {"model_name_or_path": "--model", "datasets": "--dataset", "resume_from_checkpoint": ""}
_KEYS: dict[str, tuple[str, ...]] = {
    "preferences": ("method", "beta"),
    "model": ("model_name_or_path", "dtype", "attn_implementation", "device", "seed"),
    "adapter": ("adapter", "lora_r", "lora_alpha", "target_modules", "base_dtype"),
    "data": (
        *("datasets", "max_length", "packing", "packing_strategy", "truncation", "loss_on", "chat_template"),
        *("on_bad_row", "on_bad_image", "val_size"),
    ),
    "batch and schedule": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps"),
    ),
    "optimizer": ("adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm"),
    "evaluation": ("eval_strategy", "eval_steps"),
    "output": ("output_dir", "save_strategy", "save_steps", "logging_steps", "report_to"),
}


def write_config(
    model: str, datasets: Sequence[str], output: Path, *, overwrite: bool, settings: Sequence[str] = ()
) -> list[str]:
    """Write the file and return notes about it. settings: key=value. Raises ConfigError and DataError."""
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists", hint="add --overwrite, or -o FILE")
    given, notes = _given(settings)
    name = _short_name(model)
    model = str(model_folder(model, "init --model"))
    if Path(model).is_dir():  # the file may be used from another folder
        model = os.path.abspath(model)
    else:
        _require_on_hub(model)
    seen = _look_at_data(datasets, model)
    values: dict[str, Any] = {"model_name_or_path": model, "output_dir": f"runs/{name}-tuned"}
    values |= _of_data(datasets, seen, model, has_adapter=given.get("adapter", "none") != "none") | given
    notes += _about_data(seen, values, given)
    sequences, how = _count_sequences(values, seen)
    values = _batch(values["max_length"], sequences, seen) | values
    replaced = [other for key in given for other in REPLACES.get(key, ())]
    if replaced:
        values, sequences = {key: value for key, value in values.items() if key not in replaced}, None
    values = _when(values, sequences) | values
    if sequences is not None:
        notes.append(_in_words(values, seen, sequences, how))
    omitted = (*_OMITTED[seen["kind"]], *(_WITH_PICTURES if seen["pictures"] else _WITHOUT), *replaced)
    if values.get("adapter", "none") == "none":
        omitted += _KEYS["adapter"]
    text = _text(values, tuple(key for key in omitted if key not in given))
    config = TrainConfig.from_dict(values)  # what is written is valid
    assert config.datasets
    try:
        files.write_output(output, text)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}", hint="choose another file with -o FILE"
        ) from error
    return [
        *notes,
        f"written: {output}",
        f"next: horizon data preview {output}",
        f"      horizon train {output}",
    ]


def _short_name(model: str) -> str:
    """Name a model by the last part of its path; RUN/model by that of RUN."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _of_data(
    datasets: Sequence[str], seen: dict[str, Any], model: str, *, has_adapter: bool
) -> dict[str, Any]:
    """Choose the settings that depend on what the data is."""
    kind = seen["kind"]
    values: dict[str, Any] = {
        "datasets": [
            {"path": path, "format": format} for path, format in zip(datasets, seen["formats"], strict=True)
        ],
        "max_length": _length(seen, _longest_position(model)),
    }
    if kind != "documents":
        values |= {"method": METHODS[kind], **_PREFERENCES}
    if has_adapter:
        values["learning_rate"] = _OF_ADAPTERS[kind]
    if seen["rows"] >= 100:
        values["val_size"] = 0.05
    if seen["is_chat"] and not seen["pictures"]:
        values["chat_template"] = _template_for(model)
    return values


def _about_data(seen: dict[str, Any], values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Say what was found in the data, and what was chosen for it."""
    notes = [f"data: {count(seen['rows'], 'row')} looked at, format {', '.join(seen['formats'])}"]
    if seen["pictures"]:
        notes.append(f"pictures: {seen['pictures']:,} in them; such data is not packed")
    if seen["kind"] != "documents" and "method" not in given:
        others = ", or for pairs ipo, apo, orpo, simpo and cpo" if seen["kind"] == "pairs" else ""
        notes.append(f"method: {values['method']}{others}")
    notes += _about_long_rows(seen, values["max_length"])
    if values.get("chat_template") is not None and "chat_template" not in given:
        notes.append("the tokenizer has no chat template: 'plain' is used; chatml and alpaca are others")
    return notes


def _given(settings: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings given on the command line and notes about their names. Raises ConfigError."""
    file, overrides = split_arguments(settings)
    if file is not None:
        raise ConfigError(f"command line: '{file}' is not key=value", hint="write settings as key=value")
    document, notes = collect(None, overrides, keys_of(TrainConfig))
    for key, option in _OF_ARGUMENTS.items():
        if key in document.values:
            raise ConfigError(
                f"command line: {key} cannot be set here",
                hint=f"use {option}" if option else "horizon resume RUN resumes a run",
            )
    given = dict(document.values)
    document.values.update(model_name_or_path="model", datasets=["data"])
    TrainConfig.from_document(document)  # unknown keys and wrong values, before any data is read
    return given, notes


def _look_at_data(datasets: Sequence[str], model: str) -> dict[str, Any]:
    """Look at the rows. Raises DataError, and ConfigError for pictures and a model of text alone."""
    formats, rows, longest, characters, is_chat, is_all = [], 0, 0, 0, False, True
    sizes: list[int] = []  # of documents that are not split when too long
    pictures, each = 0, 0  # and characters in place of one
    for path in datasets:
        documents = Documents([DatasetConfig(path=path)])
        is_here = Path(path).expanduser().exists()  # else more rows would be downloaded
        found = 0
        for placed in documents:
            if found == _LOOKED_AT and not is_here or rows + found == _COUNTED_ROWS:
                is_all = False
                break
            found += 1
            is_chat = is_chat or any(isinstance(e, Chat) for e in _documents(placed.example))
            own = placed.example.pictures if isinstance(placed.example, Chat) else ()
            if own and not pictures:
                each = _CHARACTERS_A_TOKEN * _tokens_of(model, own[0], placed.place)
            pictures += len(own)
            size = max(_size(document) for document in _documents(placed.example)) + each * len(own)
            longest = max(longest, size if found <= _LOOKED_AT else 0)
            if not isinstance(placed.example, Text):
                sizes.append(size)
            characters += size if not sides(placed.example) else sum(map(len, texts(placed.example)))
            if characters > _COUNTED_CHARACTERS:
                is_all = False
                break
        if not found:
            raise DataError(f"{path} has no rows", hint="run horizon data preview, which shows why")
        formats.append(str(documents.formats[0]))
        if kind_of(formats[-1]) != kind_of(formats[0]):
            raise two_kinds(datasets[0], kind_of(formats[0]), path, kind_of(formats[-1]))
        rows += found
    return {
        "formats": formats,
        "kind": kind_of(formats[0]),
        "rows": rows,
        "longest": longest,
        "characters": characters,
        "is_chat": is_chat,
        "is_all": is_all,
        "sizes": sizes,
        "pictures": pictures,
    }


def _documents(example: Example) -> tuple[Example, ...]:
    """Return the documents that an example becomes."""
    return sides(example) or (example,)


def _size(example: Example) -> int:
    """Return about as many characters as the tokens of a document will have."""
    shown = {key: value for key, value in example.__dict__.items() if key != "pictures"}
    return len(json.dumps(shown, default=str, ensure_ascii=False))


def _tokens_of(model: str, picture: Picture, place: str) -> int:
    """Return the tokens of a picture. Raises ConfigError for a model that takes none, DataError."""
    try:
        tokenizer = load_tokenizer(model)
        processor = load_processor(model, tokenizer)
    except HorizonError:
        return _PICTURE_TOKENS  # unavailable, or it needs a library that is not installed
    if processor is None:
        raise ConfigError(
            f"{place} has pictures, and {model} has no processor for them: it is a text-only model",
            hint="choose a vision-language model",
        )
    return len(processor.tokens(processor.mark, [open_picture(picture, place)], place).ids)


def _about_long_rows(seen: dict[str, Any], max_length: int) -> list[str]:
    """Note how many rows will be dropped, by an estimate of their tokens; the preview counts them."""
    sizes = seen["sizes"]
    long = sum(size > max_length * _CHARACTERS_A_TOKEN for size in sizes)
    if not long:
        return []
    share = long / len(sizes)
    return [
        f"{'warning: ' if share > WARN_ABOVE else ''}{long:,} of {count(len(sizes), 'row')} ({share:.1%}) "
        f"may be longer than max_length={max_length} and would be left out; truncation=keep_start cuts them"
    ]


def _longest_position(model: str) -> int:
    """Return max_position_embeddings of a local model, else our own limit."""
    try:
        values = json.loads(files.read_text(Path(model) / "config.json"))
        text = values.get("text_config", values)
        return int(text.get("max_position_embeddings") or _LONGEST)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return _LONGEST


def _length(seen: dict[str, Any], limit: int) -> int:
    """Return the power of two that the data needs, within the limit of the model and ours."""
    is_known = seen["is_chat"] or seen["kind"] != "documents"
    wanted = max(256, seen["longest"] // _CHARACTERS_A_TOKEN) if is_known else _LONGEST
    return min(1 << (wanted - 1).bit_length(), limit, _LONGEST)


def _require_on_hub(model: str) -> None:
    """Raise ConfigError for a name that the Hub does not know."""
    require_reachable(model, "--model")
    try:
        load_tokenizer(model, key="--model")
    except ConfigError as error:  # a model without a tokenizer, or a gated one, exists
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RepositoryNotFoundError):
            cause = cause.__cause__
        if cause is None or isinstance(cause, GatedRepoError):
            return
        raise ConfigError(
            f"--model={model!r} is neither a folder here nor a model of the Hub",
            hint=f"check the name; looked in {Path.cwd()}; a private model needs `hf auth login`",
        ) from None


def _template_for(model: str) -> str | None:
    try:
        tokenizer = load_tokenizer(model)
    except HorizonError:
        return None  # unavailable: its own template will be used, if it has one
    return None if tokenizer.chat_template else "plain"


def _count_sequences(values: dict[str, Any], seen: dict[str, Any]) -> tuple[int | None, str]:
    """Return the number of training sequences and "about " if it is an estimate; None for large data.

    Tokenises and packs small data as training does if the tokenizer is available.
    """
    if not seen["is_all"]:
        return None, ""
    if seen["characters"] <= _TOKENISED_CHARACTERS:
        few = {**values, "dataset_cache_dir": None, "dataset_num_proc": 1}
        with suppress(HorizonError):
            return len(load_training_data(TrainConfig.from_dict(few)).rows), ""
    tokens = seen["characters"] // _CHARACTERS_A_TOKEN
    return max(1, int(tokens * (1 - values.get("val_size", 0)) // values["max_length"])), "about "


def _batch(max_length: int, sequences: int | None, seen: dict[str, Any]) -> dict[str, Any]:
    """Choose epochs and step size for this many sequences, by the rule of tokens_per_step=auto."""
    is_text = not seen["is_chat"] and seen["kind"] == "documents"
    epochs = 3 if seen["is_chat"] and seen["kind"] == "documents" else 1
    width = 2 * max_length if seen["kind"] == "pairs" else max_length
    rows, micro_batches = usual_cut(width, sequences, is_text=is_text, epochs=epochs)
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": micro_batches,
        "num_train_epochs": epochs,
        "adam_beta2": 0.95 if is_text else 0.999,
    }


def _steps(values: dict[str, Any], sequences: int) -> int:
    size = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return int(values["num_train_epochs"]) * -(-sequences // size)


def _when(values: dict[str, Any], sequences: int | None) -> dict[str, Any]:
    """Choose when to evaluate and save: a short run never reaches the defaults' steps."""
    fields = TrainConfig.model_fields
    steps = None if sequences is None else _steps(values, sequences)
    found: dict[str, Any] = {}
    by_epoch = values["num_train_epochs"] > 1
    if steps is not None and steps < 2 * fields["save_steps"].default:
        found |= {"save_strategy": "epoch"} if by_epoch else {"save_steps": max(1, steps // 2)}
    if "val_size" in values:
        found["eval_strategy"] = "steps"
        if steps is not None and steps < 4 * fields["eval_steps"].default:
            found |= {"eval_strategy": "epoch"} if by_epoch else {"eval_steps": max(1, steps // 4)}
    return found


def _in_words(values: dict[str, Any], seen: dict[str, Any], sequences: int, how: str) -> str:
    steps, epochs = _steps(values, sequences), values["num_train_epochs"]
    size = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    noun = _NOUNS[seen["kind"]]
    rows = count(seen["rows"], "chat" if seen["is_chat"] and noun == "row" else noun)
    width = f"{'2 x ' if seen['kind'] == 'pairs' else ''}{values['max_length']:,}"
    held_out = f", {values['val_size']:.0%} of them held out," if "val_size" in values else ""
    return (
        f"{rows}{held_out} = {how}{count(sequences, 'sequence')} of {width}; "
        f"{count(epochs, 'epoch')} {'is' if epochs == 1 else 'are'} {how}{count(steps, 'step')} of "
        f"{count(size, 'sequence')}"
    )


def _text(values: dict[str, Any], omitted: tuple[str, ...]) -> str:
    lines = [
        "# Written by `horizon init`. Change any key here or on the command line (key=value);",
        "# `horizon train --help` lists the others.",
    ]
    listed = {key for known in _KEYS.values() for key in known}
    others = tuple(key for key in values if key not in listed)
    for group, known in {**_KEYS, "others": others}.items():
        keys = [key for key in known if key not in omitted]
        if not keys:
            continue
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
    """Return the first clause of a description, as a comment."""
    clause = re.split(r"[;:.] |[.;]$", str(description))[0]
    return clause[:1].lower() + clause[1:]
