"""Whether pictures in the data, the model's processor and the settings fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from horizon_lm.config import TrainConfig
from horizon_lm.data.documents import Documents
from horizon_lm.data.pictures import LEAVE_OUT
from horizon_lm.data.processor import Processor, load_processor
from horizon_lm.data.sources import ShardOrder
from horizon_lm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def first_with_pictures(config: TrainConfig) -> str | None:
    """Return the place of the first row with pictures, if the data seem to have any. Raises DataError."""
    shards = ShardOrder(0, 0, is_fixed=True) if config.streaming else None
    return Documents([*config.datasets, *config.eval_datasets], shards=shards).first_with_pictures()


def processor_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, place: str | None
) -> Processor | None:
    """Return the processor of the model that the settings name, if it has one.

    place: of a row with pictures, if any. Raises ConfigError if there is such a row and no processor.
    """
    names = [config.tokenizer_name_or_path, config.model_name_or_path]
    for name in dict.fromkeys(name for name in names if name is not None):
        revision = config.model_revision if name == config.model_name_or_path else None
        try:
            found = load_processor(
                name, tokenizer, trust_remote_code=bool(config.trust_remote_code), revision=revision
            )
        except ConfigError:
            if place is not None:
                raise
            continue  # the data are text, which needs none
        if found is not None:
            return found
    if place is not None:
        name = config.model_name_or_path or config.tokenizer_name_or_path or "the model"
        raise ConfigError(
            f"{place} has pictures, and {name} has no processor for them: it is a text-only model",
            hint=f"choose a vision-language model, or leave the pictures out with {LEAVE_OUT}",
        )
    return None


def require_suitable(config: TrainConfig, place: str) -> None:
    """Raise ConfigError for a setting that data with pictures does not allow. place: of such a row."""
    if config.streaming:
        raise ConfigError(
            f"streaming: true, and {place} has pictures, whose features are computed before the first step",
            hint="set streaming=false",
        )
    if config.truncation in ("split", "keep_end"):
        raise ConfigError(
            f"truncation: {config.truncation}, and {place} has pictures, whose placeholders it could cut",
            hint="set truncation=drop; rows with pictures that are too long are left out",
        )
    if config.packing and config.packing_strategy != "auto":
        raise ConfigError(
            f"packing_strategy: {config.packing_strategy}, and {place} has pictures, which are not packed",
            hint="set packing=false, or packing_strategy=auto",
        )
