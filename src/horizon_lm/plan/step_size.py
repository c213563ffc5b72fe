"""The size of an optimizer step for the data: the rule of `horizon init` and of tokens_per_step=auto."""

from __future__ import annotations

import math

from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import REPLACES
from horizon_lm.words import count

CUT = REPLACES["tokens_per_step"]  # the settings that the planner cuts a step by

_TEXT_TOKENS, _CHAT_TOKENS, _MICRO_BATCH_TOKENS = 65536, 16384, 4096
_WANTED_STEPS = 50  # of a run by epochs, if the data has as many sequences
_TEXT_SUFFIXES = (".txt", ".md", ".py", ".txt.gz", ".md.gz", ".py.gz")


def usual_cut(
    max_length: int, sequences: int | None, *, is_text: bool, epochs: float | None
) -> tuple[int, int]:
    """(sequences of a micro-batch, micro-batches) of a step that suits so many sequences.

    About 16 k tokens for conversations and pairs and 64 k for text, in micro-batches of about 4 k. Fewer if a
    run of so many epochs would have less than about 50 steps; never less than one sequence, never more than
    an epoch. sequences: None if not known; epochs: None if max_steps decides the length of the run.
    """
    most = max(1, (_TEXT_TOKENS if is_text else _CHAT_TOKENS) // max_length)
    if sequences is not None:
        an_epoch = 1 if epochs is None else math.ceil(_WANTED_STEPS / epochs)
        most = min(most, max(1, sequences // an_epoch))
    rows = min(max(1, _MICRO_BATCH_TOKENS // max_length), most)
    return rows, max(1, most // rows)


def rows_wanted(config: TrainConfig, sequences: int | None, is_text: bool) -> int:
    """The sequences of a step by tokens_per_step: `auto` by the rule, a number as it is but at most an epoch.

    A pinned per_device_train_batch_size or gradient_accumulation_steps divides the result.
    """
    if config.tokens_per_step == "auto":
        epochs = None if config.max_steps > 0 else config.num_train_epochs
        rows = math.prod(usual_cut(config.max_length, sequences, is_text=is_text, epochs=epochs))
    else:
        assert isinstance(config.tokens_per_step, int)
        rows = max(1, config.tokens_per_step // config.max_length)
        if sequences is None or rows <= sequences:
            return rows
        rows = sequences
    unit = math.prod(getattr(config, key) for key in CUT if key in config.model_fields_set)
    if config.tokens_per_step == "auto":
        return max(1, rows // unit) * unit
    return -(-rows // unit) * unit  # an epoch; what is beyond the data computes nothing


def assumed_tokens(config: TrainConfig) -> tuple[int, str]:
    """The tokens of a step of tokens_per_step=auto without a look at the data, and a note on it."""
    is_text = all(_looks_like_text(dataset) for dataset in config.datasets)
    tokens = rows_wanted(config, None, is_text) * config.max_length
    kind = "text" if is_text else "conversations"
    return tokens, (
        f"tokens_per_step=auto: the data was not read; {count(tokens, 'token')} a step are assumed, as for "
        f"much {kind}, and a run takes fewer for little data"
    )


def _looks_like_text(dataset: DatasetConfig) -> bool:
    if dataset.format != "auto":
        return dataset.format == "text"
    return dataset.path == "python-stdlib" or dataset.path.lower().endswith(_TEXT_SUFFIXES)
