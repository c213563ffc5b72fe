"""The model to train: read from its folder, made with random weights, or rebuilt from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.identify import check_is_model
from horizon_lm.checkpoint.model import has_own_code, hollow_model, weights_of
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import TrainConfig, model_settings_of
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.host_model import HostModel, load_model_of
from horizon_lm.model.loading import grow_vocabulary
from horizon_lm.training.resume import Resume

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("model_name_or_path", "tokenizer_name_or_path")


def stand_in(config: TrainConfig, resume: Resume | None) -> tuple[TrainConfig, Checkpoint | None]:
    """The settings to read configuration and tokenizer by, and the checkpoint to build the model from.

    If the folder of the model or of the tokenizer is gone, or a Hub model is not on this machine, the
    checkpoint's own files replace it. Else: the settings as they are, and None.
    Raises ConfigError for a model that comes with code, which a checkpoint does not hold, and for the folder
    of a run in place of a model's.
    """
    names = {key: getattr(config, key) for key in NAMES}
    for key, name in names.items():
        check_is_model(key, name)
    if resume is None:
        return config, None
    revision = config.model_revision
    gone = [key for key, name in names.items() if name is not None and not _is_here(name, revision)]
    checkpoint = next((one for one in resume.checkpoints if _is_whole(one)), None) if gone else None
    if checkpoint is None:
        return config, None
    if "model_name_or_path" in gone and has_own_code(checkpoint):
        raise ConfigError(
            f"model_name_or_path={names['model_name_or_path']!r} does not exist, and the model comes with "
            "code of its own, which a checkpoint does not hold",
            hint="model_name_or_path=NEW, the folder where it is now",
        )
    place = str(checkpoint.path.resolve())
    found = config.replace(**dict.fromkeys(gone, place))
    return found, checkpoint if "model_name_or_path" in gone else None


def _is_here(name: str, revision: str | None) -> bool:
    """Whether a model's folder is there, or the cache has a model of the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def _is_whole(checkpoint: Checkpoint) -> bool:
    """Whether configuration, tokenizer and buffers of a checkpoint are there and are what was written."""
    files = checkpoint.manifest.files
    try:
        for name in files:
            if not name.startswith("unit-"):
                read_small(checkpoint, name)
    except CheckpointError:
        return False
    return "config.json" in files and "tokenizer_config.json" in files


def model_without_source(checkpoint: Checkpoint, config: TrainConfig) -> HostModel:
    """The model that a checkpoint was saved of, with no values yet: `restore` has them."""
    settings = model_settings_of(config)
    hollow = hollow_model(
        checkpoint,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    # Tensors of zeros that take no memory: the model is looked at before it is cut, which runs parts of it.
    zeros = {n: torch.zeros((), dtype=p.dtype).expand(p.shape) for n, p in hollow.named_parameters()}
    # Buffers as they were saved: those of a new model may be equal, and would share their memory for good.
    buffers = weights_of(checkpoint, DTYPES[config.dtype])[-1].load()
    hollow.load_state_dict({**zeros, **buffers}, strict=False, assign=True)
    hollow.tie_weights()
    return HostModel(hollow, settings)


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> HostModel:
    """The model to train: read, or with random weights and, where not given, the tokenizer's vocabulary."""
    settings = model_settings_of(config)
    if config.model_name_or_path is not None:
        model = load_model_of(config.model_name_or_path, settings)
        if config.new_tokens:
            grow_vocabulary(model, len(tokenizer), config.seed)
        return HostModel(model, settings)
    assert config.init_model is not None  # TrainConfig has seen to it
    fitting = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = {**fitting, **config.init_model}
    if config.new_tokens:
        values["vocab_size"] = max(values["vocab_size"], len(tokenizer))
    return HostModel.from_config(values, settings)
