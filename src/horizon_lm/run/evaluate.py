"""`horizon eval`: a model on held-out data, streamed as in training, without gradients or moments."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from ..config import ModelSettings, TrainConfig
from ..data.training_data import load_eval_rows, load_training_data, make_encoder, pad_id, tokenizer_of
from ..errors import ConfigError
from ..model.loading import grow_vocabulary
from .evaluation import evaluate
from .generate import model_folder
from .host_model import HostModel, load_model_of
from .progress import say
from .quiet import quiet_transformers


def evaluate_model(config: TrainConfig) -> dict[str, Any]:
    """eval_loss, eval_perplexity, eval_tokens and eval_seconds of the model that `config` names.

    On eval_datasets; else on what val_size holds out; else on datasets. Raises ConfigError and DataError.
    """
    if config.model_name_or_path is None:
        raise ConfigError("there is no model to evaluate", hint="model_name_or_path=FOLDER")
    config = config.replace(model_name_or_path=str(model_folder(config.model_name_or_path)))
    assert config.model_name_or_path is not None
    tokenizer = tokenizer_of(config)
    encoder = make_encoder(config, tokenizer)
    if config.val_size:
        rows = load_training_data(config, tokenizer).eval_rows
        assert rows is not None
    else:
        rows = load_eval_rows(config, encoder)
    say(f"evaluating on {len(rows):,} sequences, {rows.num_tokens:,} tokens", sys.stderr)
    settings = ModelSettings(**{key: getattr(config, key) for key in ModelSettings.model_fields})
    with quiet_transformers():
        model = load_model_of(config.model_name_or_path, settings)
        if config.new_tokens:
            grow_vocabulary(model, len(tokenizer), config.seed)
    model.requires_grad_(False)  # no gradients and no moments: weights alone
    found = evaluate(
        HostModel(model, settings.replace(freeze=[], lr_factors={})),  # which name what is trained
        rows,
        micro_batch_size=config.per_device_eval_batch_size or config.per_device_train_batch_size,
        pad_id=pad_id(tokenizer),
    )
    return {key: value for key, value in asdict(found).items() if key != "step"}
