"""All data of a training run: documents, tokenizer, tokens, training and evaluation sequences."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.data import picture_checks
from horizon_lm.data.detect import require_suitable, with_method
from horizon_lm.data.documents import Documents
from horizon_lm.data.encode import Encoder
from horizon_lm.data.loader import TokenLoader
from horizon_lm.data.mismatched import BLOCK
from horizon_lm.data.packing import Layout, make_rows, split_off, weighted
from horizon_lm.data.processor import Processor
from horizon_lm.data.rows import Rows
from horizon_lm.data.streaming import Stream, StreamLoader
from horizon_lm.data.tokenizer import add_new_tokens, load_tokenizer, train_tokenizer
from horizon_lm.data.tokens import TokenStore, tokenise
from horizon_lm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Data of a training run. rows: training sequences (of a stream: its first window); eval_rows: held out.

    store: tokens of all documents read for training. loader: yields steps. was_cached: the tokens came from
    the cache. processor: of a vision-language model, saved with it.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    store: TokenStore
    rows: Rows
    eval_rows: Rows | None
    loader: TokenLoader | StreamLoader
    was_cached: bool
    processor: Processor | None = None


def load_training_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> TrainingData:
    """Read, tokenise and pack the data that `config` names.

    Without `tokenizer`, loads one, or trains one on the data (train_tokenizer_vocab_size), which reads the
    data once more but never holds all of it. Resolves method: auto. Raises `DataError` and `ConfigError`.
    """
    datasets = limited(config, config.datasets)
    if tokenizer is None:
        tokenizer = _tokenizer_for(config, _documents(config, datasets))
    processor, encoder = with_processor(config, tokenizer)
    config = with_method(config)
    require_suitable(config, config.data_kind)
    seed = data_seed(config)
    batch = {
        "micro_batch_size": config.per_device_train_batch_size,
        "micro_batches_per_step": config.gradient_accumulation_steps,
        "seed": seed,
        "pad_id": pad_id(tokenizer),
        "num_workers": config.dataloader_num_workers,
    }
    if config.streaming:
        stream = Stream(
            datasets,
            encoder,
            lambda store: layout(config, store),
            config.buffer_size,
            config.max_train_bytes,
            config.on_bad_row,
        )
        streamed = StreamLoader(stream, **batch)
        rows = streamed.first_rows
        eval_rows = _eval_rows(config, encoder)
        return TrainingData(tokenizer, encoder, rows.store, rows, eval_rows, streamed, False, processor)
    store, was_cached = _tokens(config, _documents(config, datasets), encoder)
    numbers = np.arange(store.num_samples)
    held_out: np.ndarray | None = None
    if config.val_size:
        numbers, held_out = split_off(len(numbers), config.val_size, seed, store.noun)
    weights = [dataset.weight for dataset in config.datasets]
    how = layout(config, store)
    rows = make_rows(store, weighted(store, numbers, weights, seed), **how)
    eval_rows = _eval_rows(config, encoder)
    if held_out is not None:
        eval_rows = make_rows(store, held_out, keep_rest=True, **how)
    loader = TokenLoader(rows, **batch)
    return TrainingData(tokenizer, encoder, store, rows, eval_rows, loader, was_cached, processor)


def with_processor(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Processor | None, Encoder]:
    """Return the model's processor, if any, and an encoder that uses it if the data has pictures."""
    place = picture_checks.first_with_pictures(config)
    processor = picture_checks.processor_of(config, tokenizer, place)
    if place is not None:
        picture_checks.require_suitable(config, place)
    return processor, make_encoder(config, tokenizer, processor if place is not None else None)


def _eval_rows(config: TrainConfig, encoder: Encoder) -> Rows | None:
    if not config.eval_datasets:
        return None
    return load_eval_rows(config, encoder)


def load_eval_rows(config: TrainConfig, encoder: Encoder) -> Rows:
    """Load all sequences of eval_datasets or, without any, of datasets. Raises DataError, ConfigError."""
    config = with_method(config)
    require_suitable(config, config.data_kind)
    if config.eval_datasets:
        datasets = limited(config, config.eval_datasets)
        documents = Documents(datasets, kind=config.data_kind, **_on_bad(config))
    else:
        documents = _documents(config, limited(config, config.datasets))
    store, _ = _tokens(config, documents, encoder)
    how = layout(config, store)
    return make_rows(store, np.arange(store.num_samples), keep_rest=True, **how)


def limited(config: TrainConfig, datasets: list[DatasetConfig]) -> list[DatasetConfig]:
    """Return the entries, each with its own `max_samples` or that of the settings."""
    if config.max_samples is None:
        return datasets
    return [
        dataset
        if dataset.max_samples is not None
        else dataset.model_copy(update={"max_samples": config.max_samples})
        for dataset in datasets
    ]


def _documents(config: TrainConfig, datasets: list[DatasetConfig]) -> Documents:
    kind = None if config.method == "auto" else config.data_kind
    return Documents(datasets, config.max_train_bytes, kind=kind, **_on_bad(config))


class _OnBad(TypedDict):
    on_bad_row: str
    on_bad_image: str


def _on_bad(config: TrainConfig) -> _OnBad:
    return {"on_bad_row": config.on_bad_row, "on_bad_image": config.on_bad_image}


def _tokens(config: TrainConfig, documents: Documents, encoder: Encoder) -> tuple[TokenStore, bool]:
    return tokenise(
        documents,
        encoder,
        cache_dir=cache_dir(config.dataset_cache_dir),
        num_proc=config.dataset_num_proc,
        kl_block=BLOCK if config.uses_kl else 0,
    )


def cache_dir(setting: str | None) -> str | None:
    """Resolve the folder of the token cache; `auto` follows XDG_CACHE_HOME."""
    if setting != "auto":
        return setting
    base = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache")
    return str(Path(base, "horizon-lm", "tokens").expanduser())


def make_encoder(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, processor: Processor | None = None
) -> Encoder:
    return Encoder(
        tokenizer,
        loss_on=config.loss_on,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
        processor=processor,
    )


def layout(config: TrainConfig, store: TokenStore) -> Layout:
    """Resolve how documents become sequences: `auto` depends on whether all are text. Labelled samples and
    data with pictures are not packed."""
    is_text = store.counts.is_text
    is_packed = config.packing and store.kind != "labelled" and store.pictures is None
    strategy = config.packing_strategy if is_packed else "none"
    if strategy == "auto":
        strategy = "wrapped" if is_text else "bfd"
    truncation = config.truncation
    if truncation == "auto":
        truncation = "split" if is_text else "drop"
    return {"max_length": config.max_length, "strategy": strategy, "truncation": truncation}


def data_seed(config: TrainConfig) -> int:
    return int(config.seed if config.data_seed is None else config.data_seed)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def tokenizer_of(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the settings name. Raises ConfigError."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    if not name:
        raise ConfigError(
            "no tokenizer given",
            hint="set tokenizer_name_or_path, or train_tokenizer_vocab_size to train one on the data",
        )
    revision = None if config.tokenizer_name_or_path else config.model_revision
    key = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
    trusted = bool(config.trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trusted, revision=revision, key=key)
    return add_new_tokens(tokenizer, config.new_tokens)


def _tokenizer_for(config: TrainConfig, documents: Documents) -> PreTrainedTokenizerBase:
    if config.train_tokenizer_vocab_size:
        tokenizer = train_tokenizer(documents.texts(), config.train_tokenizer_vocab_size)
        return add_new_tokens(tokenizer, config.new_tokens)
    return tokenizer_of(config)
