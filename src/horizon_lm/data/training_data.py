"""All of a run's training data in one call: documents, tokenizer, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from horizon_lm.data.packing import pack_documents
from horizon_lm.data.sources import Documents
from horizon_lm.data.tokenizer import load_tokenizer, train_tokenizer
from horizon_lm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """`blocks` [n, max_length] of token ids (uint16 or uint32), and what they were made with.

    `num_documents` were read, beside `num_empty_documents` that hold nothing. They have
    `num_tokens` tokens; `dropped_tokens` of these, at the end, did not fill a block.
    """

    tokenizer: PreTrainedTokenizerBase
    blocks: np.ndarray
    num_documents: int
    num_empty_documents: int
    num_tokens: int
    dropped_tokens: int


def load_training_data(config: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> TrainingData:
    """Read, tokenise and pack what `config` names.

    Read from `config`: datasets, max_train_bytes, max_length, and, if no `tokenizer` is
    given, train_tokenizer_vocab_size (one is trained on the data) or else
    tokenizer_name_or_path, model_name_or_path, model_revision and trust_remote_code.
    The data is read once more if a tokenizer is trained, never kept whole.
    Raises `DataError` and `ConfigError`.
    """
    documents = Documents(config.datasets, config.max_train_bytes)
    if tokenizer is None:
        tokenizer = _tokenizer_for(config, documents)
    packed = pack_documents(documents, tokenizer, config.max_length)
    return TrainingData(
        tokenizer=tokenizer,
        blocks=packed.blocks,
        num_documents=packed.num_documents,
        num_empty_documents=documents.num_empty,
        num_tokens=packed.num_tokens,
        dropped_tokens=packed.dropped_tokens,
    )


def _tokenizer_for(config: Any, documents: Documents) -> PreTrainedTokenizerBase:
    if config.train_tokenizer_vocab_size:
        return train_tokenizer(documents, config.train_tokenizer_vocab_size)
    name = config.tokenizer_name_or_path or config.model_name_or_path
    if not name:
        raise ConfigError(
            "no tokenizer is named",
            hint="set tokenizer_name_or_path, or train_tokenizer_vocab_size to train one on the data",
        )
    revision = None if config.tokenizer_name_or_path else config.model_revision
    return load_tokenizer(name, trust_remote_code=bool(config.trust_remote_code), revision=revision)
