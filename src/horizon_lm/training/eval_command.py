"""`horizon eval`: evaluate a model on held-out data, streamed as in training, without gradients or moments.

Takes a configuration (its model_name_or_path), a run (its trained model; its latest checkpoint if it is not
finished), a checkpoint, a model's folder, or a model's name on the Hub.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from horizon_lm.checkpoint.adapted import adapter_folder, base_name_of, base_of, check_base
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.identify import Identified, has_adapter, identify, may_be_on_hub, no_model
from horizon_lm.checkpoint.model import model_of
from horizon_lm.config import DatasetConfig, ModelSettings, TrainConfig, model_settings_of
from horizon_lm.config.adapters import AdapterSettings
from horizon_lm.config.base import collect, keys_of
from horizon_lm.config.dataset_info import SUFFIXES
from horizon_lm.config.yaml import Document
from horizon_lm.data.detect import with_method
from horizon_lm.data.preview import remarks
from horizon_lm.data.processor import Processor
from horizon_lm.data.rows import Rows
from horizon_lm.data.training_data import (
    load_eval_rows,
    load_training_data,
    pad_id,
    tokenizer_of,
    with_processor,
)
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.io import files
from horizon_lm.model.loading import grow_vocabulary, load_model_of
from horizon_lm.model.pretrained import quiet_transformers
from horizon_lm.preference.method import Method
from horizon_lm.preference.reference import Reference
from horizon_lm.report.display import say
from horizon_lm.report.metrics import versions
from horizon_lm.report.records import Evaluation
from horizon_lm.training.build import hosted
from horizon_lm.training.evaluate import evaluate
from horizon_lm.training.generate import model_folder
from horizon_lm.training.pictures import encode_pictures
from horizon_lm.training.preferences import Preferences, pass_of, reference_model
from horizon_lm.training.run_settings import given_keys, read_settings
from horizon_lm.training.together import Together
from horizon_lm.words import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Target:
    """What to evaluate, and with which settings. what: in words. checkpoints: sources of the weights, best
    first; empty if model_name_or_path is the source. reference: the model from which a run started."""

    config: TrainConfig
    what: str
    checkpoints: tuple[Checkpoint, ...] = ()
    reference: str | None = None


def target_of(place: str | None, overrides: Sequence[str]) -> tuple[Target, list[str]]:
    """Return what `horizon eval PLACE key=value ...` means, and notes on how the settings were read.

    Raises ConfigError if there is no model or no data.
    """
    given = given_keys(overrides)
    looked = identify(place) if place is not None else None
    what = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    reference: str | None = None
    if looked is not None and looked.kind == "file" and looked.path.name.lower().endswith(SUFFIXES):
        raise ConfigError(
            f"{place} is data, not a model, a run or a configuration",
            hint=f"run horizon eval MODEL eval_datasets={place}",
        )
    if looked is None or looked.kind in ("configuration", "file"):
        document, notes = collect(place, overrides, keys_of(TrainConfig))
    elif looked.kind in ("run", "checkpoint"):
        document, notes = _of_run(looked, overrides)
        own, what, checkpoints = _model_of_run(looked)
        reference = document.values.get("model_name_or_path")
        if "model_name_or_path" not in given:
            document.values.update({key: value for key, value in own.items() if key not in given})
        else:
            what, checkpoints = "", ()
            document.values["init_model"] = None
    else:
        if looked.kind != "model" and not (looked.kind == "absent" and may_be_on_hub(str(place))):
            raise no_model(looked, "eval")
        document, notes = collect(None, overrides, keys_of(TrainConfig))
        document.values.setdefault("model_name_or_path", str(looked.model or place))
    _choose_data(document, given)
    config = TrainConfig.from_document(document)
    if config.model_name_or_path is not None and not what:
        looked = identify(config.model_name_or_path)
        if looked.kind == "run" and looked.model is None and looked.checkpoints:
            raise no_model(looked, "eval")
        what = str(model_folder(config.model_name_or_path, "eval"))
    return Target(_fitted(config, given), what, tuple(checkpoints), reference), notes


def _of_run(looked: Identified, overrides: Sequence[str]) -> tuple[Document, list[str]]:
    run = looked.path if looked.kind == "run" else looked.path.resolve().parent
    if (run / "config.resolved.yaml").is_file():
        return read_settings(run, overrides)
    document, notes = collect(None, overrides, keys_of(TrainConfig))
    if looked.checkpoints:  # a checkpoint that was copied without its run
        known = TrainConfig.model_fields.keys()
        saved = {k: v for k, v in looked.checkpoints[0].manifest.config.items() if k in known}
        document.values.update({k: v for k, v in saved.items() if k not in document.values})
    return document, notes


def _model_of_run(looked: Identified) -> tuple[dict[str, Any], str, tuple[Checkpoint, ...]]:
    """Return (settings that name the model, the model in words, checkpoints to read it from)."""
    none = {"init_model": None, "train_tokenizer_vocab_size": None, "model_revision": None}
    if looked.model is not None and looked.is_finished:
        names = {"model_name_or_path": str(looked.model), "tokenizer_name_or_path": None}
        return {**none, **names}, f"{looked.model} (the run is finished, {count(looked.step, 'step')})", ()
    if not looked.checkpoints:
        raise no_model(looked, "eval")
    best = looked.checkpoints[0]
    names = {key: str(best.path) for key in ("model_name_or_path", "tokenizer_name_or_path")}
    why = " (the run is not finished)" if looked.kind == "run" else ""
    return {**none, **names}, f"{best.path}, step {best.manifest.step:,}{why}", looked.checkpoints


def _choose_data(document: Document, given: set[str]) -> None:
    """Let data on the command line replace all data of a file. Raises ConfigError if there is none."""
    values = document.values
    if "eval_datasets" in given:
        values["val_size"] = 0
    elif "datasets" in given:
        values["eval_datasets"], values["val_size"] = [], 0
    if not values.get("datasets") and not values.get("eval_datasets"):
        raise ConfigError(
            "there is nothing to evaluate on", hint="set eval_datasets=FILE, a folder or a Hub name"
        )
    if not values.get("eval_datasets") and not values.get("val_size"):
        values["eval_strategy"] = "no"  # any other value needs one of them
    values.setdefault("datasets", values.get("eval_datasets"))


def _fitted(config: TrainConfig, given: set[str]) -> TrainConfig:
    """Cut max_length to what the model takes, unless it was set."""
    name = config.model_name_or_path
    if name is None or "max_length" in given or "max_length" in config.model_fields_set:
        return config
    try:
        folder = Path(model_folder(name))
        base = Path(base_of(folder)) if has_adapter(folder) else folder
        values = json.loads(files.read_text(base / "config.json"))
        longest = values.get("max_position_embeddings", values.get("n_positions"))
    except (OSError, ValueError, ConfigError):
        return config
    if isinstance(longest, int) and 1 < longest < config.max_length:
        return config.replace(max_length=longest)
    return config


def evaluate_model(config: TrainConfig) -> dict[str, Any]:
    """Evaluate the model that `config` names."""
    if config.model_name_or_path is None:
        raise ConfigError("there is no model to evaluate", hint="set model_name_or_path=FOLDER")
    return evaluate_target(Target(config, str(model_folder(config.model_name_or_path, "eval"))))


def evaluate_target(
    target: Target,
    warn: Callable[[str], None] = lambda text: say(f"warning: {text}", sys.stderr),
    together: Together | None = None,
) -> dict[str, Any]:
    """Evaluate on eval_datasets; else on what val_size holds out; else on datasets.

    Returns eval_loss (mean cross-entropy in nats over all target tokens), eval_perplexity, eval_tokens,
    eval_sequences, eval_seconds, and in words: model, data, dtype. On preferences eval_loss is that of the
    method, with its metrics in place of the perplexity. On several ranks each holds its share of the model,
    and all return the same. Raises ConfigError, DataError and CheckpointError.
    """
    together = together or Together()
    config = target.config
    together.agree("settings", {"model": target.what, **config.to_dict(), **versions()})
    evaluated = config.datasets if config.val_size or not config.eval_datasets else config.eval_datasets
    config = config.replace(method=with_method(config.replace(datasets=evaluated)).method)
    if config.model_name_or_path is None:
        raise ConfigError(
            "there is no model to evaluate",
            hint="run horizon eval RUN or horizon eval FOLDER, or set model_name_or_path=FOLDER",
        )
    if not target.checkpoints:
        config = config.replace(model_name_or_path=str(model_folder(config.model_name_or_path, "eval")))
    tokenizer = tokenizer_of(config)
    processor, rows = together.in_order("data", lambda: _rows(config, tokenizer))
    together.agree("data", {"data": rows.fingerprint})
    data = _data_in_words(config)
    size = f"{count(len(rows), 'sequence')}, {count(rows.num_tokens, 'token')}"
    say(f"evaluating {target.what} on {data}: {size}", sys.stderr)
    for remark in remarks(rows):
        say(f"{'warning: ' if remark.is_warning else ''}{remark}", sys.stderr)
    with quiet_transformers(), ExitStack() as stack:
        measure = _measure_of(target, config, rows, tokenizer, warn, together.ranks)
        added = stack.enter_context(_adapter_of(target, config, warn))
        settings = _settings_of(config, added)
        names: list[str] = []

        def load() -> nn.Module:
            if added is not None:
                model, what = load_model_of(added.base, settings), added.what
            else:
                model, what = _load(target, config, settings, len(tokenizer), warn)
            names.append(what)
            return model.requires_grad_(False)  # allocates neither gradients nor moments

        model = hosted(load, settings, together.ranks)
        if added is not None and added.checkpoint is not None:
            check_base(added.checkpoint, model.base_fingerprint(), added.base)
    what = names[0]
    together.agree("model", {"model": what})
    shown = partial(say, stream=sys.stderr)
    encode_pictures(model, (rows,), processor, config, together, shown)
    batch = config.per_device_eval_batch_size or config.per_device_train_batch_size
    found = measure(model, rows, micro_batch_size=batch, pad_id=pad_id(tokenizer))
    line = {**found.to_line(), "eval_sequences": len(rows)}
    del line["step"]
    return {**line, "model": what, "data": data, "dtype": config.dtype}


def _rows(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Processor | None, Rows]:
    """Return the model's processor, if any, and the sequences to evaluate on."""
    if not config.val_size:
        read = config.replace(datasets=config.eval_datasets) if config.eval_datasets else config
        processor, encoder = with_processor(read, tokenizer)
        return processor, load_eval_rows(config, encoder)
    data = load_training_data(config, tokenizer)
    assert data.eval_rows is not None
    return data.processor, data.eval_rows


def _measure_of(
    target: Target,
    config: TrainConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    warn: Callable[[str], None],
    ranks: Ranks,
) -> Callable[..., Evaluation]:
    """Return what evaluates the model. On preferences it compares with a reference, which runs first.

    Raises ConfigError if there is none.
    """
    if not config.is_preference:
        return evaluate
    reference = None
    if config.uses_reference:
        name, adapter = config.ref_model_name_or_path, None
        if name is None:
            name, adapter = target.reference, config.adapter_name_or_path
        if name is None:
            raise ConfigError(
                f"method: {config.method} compares the model with a reference, and there is none",
                hint="set ref_model_name_or_path=FOLDER, the model before training",
            )
        say(f"reference: {name}{'' if adapter is None else f' with {adapter}'}", sys.stderr)
        config = config.replace(ref_model_name_or_path=name)
        reference = Reference()
        with reference_model(config, len(tokenizer), rows, ranks, adapter=adapter) as model:
            passes = pass_of(config, pad_id(tokenizer), lambda text: say(text, sys.stderr), warn)
            passes.over(model, {"eval": rows}, reference)
    return Preferences(Method(config), reference).evaluate


class _Added(NamedTuple):
    """An adapter, in PEFT's folder, and its base. checkpoint: where it is from, if not from that folder."""

    folder: Path
    base: str
    what: str
    checkpoint: Checkpoint | None = None


@contextmanager
def _adapter_of(target: Target, config: TrainConfig, warn: Callable[[str], None]) -> Iterator[_Added | None]:
    """Yield the adapter to evaluate, None for a whole model. Of several checkpoints it is that of the first
    sound one. Raises CheckpointError, ConfigError."""
    if not target.checkpoints:
        folder = Path(str(config.model_name_or_path))
        if not has_adapter(folder):
            yield None
            return
        base, reference = base_of(folder), target.reference
        if reference is not None and not Path(base).is_dir():
            base = reference  # found next to a run that was moved
        yield _Added(folder, base, target.what)
        return
    best = target.checkpoints[0]
    if best.manifest.base is None:
        yield None
        return
    if "adapter" not in best.manifest.state:
        raise ConfigError(
            f"{best.path} holds {best.manifest.holds}, which is not a model by itself",
            hint="train an adapter (adapter: lora) on packed weights",
        )
    with ExitStack() as stack:
        yield _sound_adapter(target, config, warn, stack)


def _settings_of(config: TrainConfig, added: _Added | None) -> ModelSettings:
    """Settings of a model that is not trained, with a saved adapter or without any."""
    settings = model_settings_of(config)
    changes = {key: AdapterSettings.model_fields[key].default for key in AdapterSettings.__annotations__}
    if added is not None:
        kept = ("base_dtype", "base_cache_dir")
        changes |= {"adapter_name_or_path": str(added.folder), **{k: getattr(settings, k) for k in kept}}
    return settings.replace(**changes, lr_factors={})


def _sound_adapter(
    target: Target, config: TrainConfig, warn: Callable[[str], None], stack: ExitStack
) -> _Added:
    last: CheckpointError | None = None
    for number, checkpoint in enumerate(target.checkpoints):
        try:
            opened = adapter_folder(checkpoint, trust_remote_code=config.trust_remote_code)
            folder = stack.enter_context(opened)
        except CheckpointError as error:
            warn(f"skipped {error.message}")
            last = error
            continue
        base = target.reference or base_name_of(checkpoint)
        step = f"{checkpoint.path}, step {checkpoint.manifest.step:,}"
        return _Added(folder, base, target.what if number == 0 else step, checkpoint)
    assert last is not None
    raise last


def _load(
    target: Target,
    config: TrainConfig,
    settings: ModelSettings,
    num_tokens: int,
    warn: Callable[[str], None],
) -> tuple[nn.Module, str]:
    """Return the model and its name in words; of several checkpoints the first sound one."""
    assert config.model_name_or_path is not None
    if not target.checkpoints:
        model = load_model_of(config.model_name_or_path, settings)
        if config.new_tokens:
            grow_vocabulary(model, num_tokens, config.seed)
        return model, target.what
    last: CheckpointError | None = None
    for number, checkpoint in enumerate(target.checkpoints):
        try:
            model = model_of(
                checkpoint,
                trust_remote_code=settings.trust_remote_code,
                attn_implementation=settings.attn_implementation,
            )
            step = f"{checkpoint.path}, step {checkpoint.manifest.step:,}"
            return model, target.what if number == 0 else step
        except CheckpointError as error:
            warn(f"skipped {error.message}")
            last = error
    assert last is not None
    raise last


def _data_in_words(config: TrainConfig) -> str:
    if config.val_size:
        return "what val_size holds out of " + _paths(config.datasets)
    if config.eval_datasets:
        return _paths(config.eval_datasets)
    return f"{_paths(config.datasets)} (there are no eval_datasets: this may be what it was trained on)"


def _paths(datasets: Sequence[DatasetConfig]) -> str:
    return ", ".join(dataset.path for dataset in datasets)
