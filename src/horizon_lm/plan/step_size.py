"""The size of an optimizer step for the data, by the rule of `horizon init` and tokens_per_step=auto."""

from __future__ import annotations

import math

from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import REPLACES
from horizon_lm.words import count

CUT = REPLACES["tokens_per_step"]  # the settings by which the planner cuts a step

_TEXT_TOKENS, _CHAT_TOKENS, _MICRO_BATCH_TOKENS = 65536, 16384, 4096
_WANTED_STEPS = 50  # of a run by epochs, if the data has as many sequences
_TEXT_SUFFIXES = (".txt", ".md", ".py", ".txt.gz", ".md.gz", ".py.gz")


def usual_cut(
    row_tokens: int, sequences: int | None, *, is_text: bool, epochs: float | None
) -> tuple[int, int]:
    """Return (rows per micro-batch, micro-batches) of a step that suits the data.

    About 16 k tokens for conversations and pairs and 64 k for text, in micro-batches of about 4 k. Fewer if a
    run of that many epochs would have fewer than about 50 steps; at least one row, at most an epoch.
    row_tokens: of a sequence, or of both documents of a pair. sequences: rows of the data, None if unknown;
    epochs: None if max_steps decides the length of the run.
    """
    most = max(1, (_TEXT_TOKENS if is_text else _CHAT_TOKENS) // row_tokens)
    if sequences is not None:
        an_epoch = 1 if epochs is None else math.ceil(_WANTED_STEPS / epochs)
        most = min(most, max(1, sequences // an_epoch))
    rows = min(max(1, _MICRO_BATCH_TOKENS // row_tokens), most)
    return rows, max(1, most // rows)


def rows_wanted(config: TrainConfig, sequences: int | None, is_text: bool) -> int:
    """Return the rows of a step by tokens_per_step: `auto` by the rule, a number as is, at most an epoch.

    A pinned per_device_train_batch_size or gradient_accumulation_steps divides the result.
    """
    if config.tokens_per_step == "auto":
        epochs = None if config.max_steps > 0 else config.num_train_epochs
        rows = math.prod(usual_cut(config.row_tokens, sequences, is_text=is_text, epochs=epochs))
    else:
        assert isinstance(config.tokens_per_step, int)
        rows = max(1, config.tokens_per_step // config.row_tokens)
        if sequences is None or rows <= sequences:
            return rows
        rows = sequences
    unit = math.prod(getattr(config, key) for key in CUT if key in config.model_fields_set)
    if config.tokens_per_step == "auto":
        return max(1, rows // unit) * unit
    return -(-rows // unit) * unit  # an epoch; rows beyond the data compute nothing


def assumed_tokens(config: TrainConfig) -> tuple[int, str]:
    """Return the tokens per step that tokens_per_step=auto assumes without reading the data, and a note."""
    is_text = all(_looks_like_text(dataset) for dataset in config.datasets)
    kind = {"pairs": "pairs", "labelled": "labelled completions"}.get(config.data_kind)
    is_text = is_text and kind is None
    tokens = rows_wanted(config, None, is_text) * config.row_tokens
    kind = kind or ("text" if is_text else "conversations")
    return tokens, (
        f"tokens_per_step=auto: the data was not read; {count(tokens, 'token')} per step are assumed, as for "
        f"plenty of {kind}; a run with little data uses fewer"
    )


def _looks_like_text(dataset: DatasetConfig) -> bool:
    if dataset.format != "auto":
        return dataset.format == "text"
    return dataset.path == "python-stdlib" or dataset.path.lower().endswith(_TEXT_SUFFIXES)
