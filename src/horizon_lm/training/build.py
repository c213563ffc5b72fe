"""The model to train: read from its folder, made with random weights, or rebuilt from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.identify import check_is_model
from horizon_lm.checkpoint.model import buffers_of, has_own_code, hollow_model
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import ModelSettings, TrainConfig, model_settings_of
from horizon_lm.distributed.outcomes import in_turns
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.model.loading import grow_vocabulary, load_model_of
from horizon_lm.training.resume import Resume

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("model_name_or_path", "tokenizer_name_or_path")


def stand_in(config: TrainConfig, resume: Resume | None) -> tuple[TrainConfig, Checkpoint | None]:
    """Return the settings that name readable files, and the checkpoint to build the model from.

    If the folder of the model or the tokenizer is gone, or a Hub model is not cached, the checkpoint's own
    files replace it; else the settings stay as they are and the checkpoint is None.
    Raises ConfigError for a missing model with code of its own, which a checkpoint does not hold, and for the
    folder of a run in place of a model's.
    """
    names = {key: getattr(config, key) for key in NAMES}
    for key, name in names.items():
        check_is_model(key, name)
    if resume is None:
        return config, None
    revision = config.model_revision
    gone = [key for key, name in names.items() if name is not None and not _is_here(name, revision)]
    _check_not_gone(config, resume.checkpoints[0], gone)
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


def _check_not_gone(config: TrainConfig, checkpoint: Checkpoint, gone: Sequence[str]) -> None:
    """Raise ConfigError if what a checkpoint does not hold is gone."""
    if checkpoint.manifest.base is None:
        return
    if "model_name_or_path" in gone:
        raise ConfigError(
            f"model_name_or_path={config.model_name_or_path!r} does not exist, and {checkpoint.path} holds "
            f"{checkpoint.manifest.holds}",
            hint="model_name_or_path=NEW, the folder where it is now; its weights must be the same",
        )
    name = config.adapter_name_or_path
    if name is not None and not _is_here(name, None, "adapter_config.json"):
        raise ConfigError(
            f"adapter_name_or_path={name!r} does not exist",
            hint=f"horizon export {checkpoint.path} OUT, then adapter_name_or_path=OUT",
        )


def _is_here(name: str, revision: str | None, file: str = "config.json") -> bool:
    """Tell whether a model's folder exists, or the cache has the Hub model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except HFValidationError:
        return False


def _is_whole(checkpoint: Checkpoint) -> bool:
    """Tell whether configuration, tokenizer and buffers of a checkpoint are complete and sound."""
    files = checkpoint.manifest.files
    try:
        for name in checkpoint.manifest.small_files:
            read_small(checkpoint, name)
    except CheckpointError:
        return False
    return "config.json" in files and "tokenizer_config.json" in files


def model_without_source(checkpoint: Checkpoint, config: TrainConfig, ranks: Ranks = ALONE) -> HostModel:
    """Build the model of a checkpoint without values, which `restore` loads."""

    def load() -> nn.Module:
        return _without_values(checkpoint, config)

    return hosted(load, model_settings_of(config), ranks)


def _without_values(checkpoint: Checkpoint, config: TrainConfig) -> nn.Module:
    hollow = hollow_model(
        checkpoint,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    # Zeros that take no memory: parts of the model run while it is inspected.
    zeros = {n: torch.zeros((), dtype=p.dtype).expand(p.shape) for n, p in hollow.named_parameters()}
    # Saved buffers: equal ones of a new model would share memory from then on.
    buffers = buffers_of(checkpoint)
    hollow.load_state_dict({**zeros, **buffers}, strict=False, assign=True)
    hollow.tie_weights()
    return hollow


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = ALONE) -> HostModel:
    """Read the model to train, or draw random weights (by default with the tokenizer's vocabulary)."""
    settings = model_settings_of(config)
    name = config.model_name_or_path
    if name is None:
        assert config.init_model is not None  # checked by TrainConfig
        return HostModel.from_config(_fitting(config, tokenizer), settings)

    def load() -> nn.Module:
        model = load_model_of(name, settings)
        if config.new_tokens:
            grow_vocabulary(model, len(tokenizer), config.seed)
        return model

    return hosted(load, settings, ranks)


def hosted(load: Callable[[], nn.Module], settings: ModelSettings, ranks: Ranks) -> HostModel:
    """Load a model and move it to the store. The ranks of a node do so one after another, since each has the
    whole model for a moment."""
    if ranks.world == 1:
        return HostModel(load(), settings, ranks=ranks)
    # Before any takes its share.
    memory = available_host_bytes(settings.host_memory_bytes, sharers=ranks.local_world)
    return in_turns(ranks, lambda: HostModel(load(), settings, host_memory=memory, ranks=ranks))


def _fitting(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return init_model with the tokenizer's vocabulary and special tokens as defaults."""
    fitting = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    given = dict(config.init_model or {})
    text = given.get("text_config")
    if isinstance(text, dict):  # a vision-language model: its tokens are those of the language model
        inner = _with_tokens({**fitting, **text}, config, tokenizer)
        return {**given, "text_config": inner}
    return _with_tokens({**fitting, **given}, config, tokenizer)


def _with_tokens(
    values: dict[str, Any], config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    if config.new_tokens:
        values["vocab_size"] = max(values["vocab_size"], len(tokenizer))
    return values
