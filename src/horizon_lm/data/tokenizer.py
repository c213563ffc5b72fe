"""Tokenizers: loading one, or training one on the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from horizon_lm.errors import ConfigError
from horizon_lm.io.hub import REPOSITORY, is_offline, require_reachable
from horizon_lm.model.configuration import check_folder, reason_of
from horizon_lm.model.folder import check_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all bytes, and the end-of-text token
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    key: str = "tokenizer_name_or_path",
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder, without network access, or of a Hugging Face repository.

    Raises `ConfigError` if there is none, if it cannot be loaded, or if it has no end-of-text token, which
    separates documents. key: the setting that names it, for messages.
    """
    from transformers import AutoTokenizer

    hint = "set tokenizer_name_or_path to a folder with a tokenizer and its tokenizer_config.json"
    path = Path(name_or_path).expanduser()
    is_local = path.is_dir()
    if is_local and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{name_or_path} has no tokenizer", hint=hint)
    if not is_local and (path.exists() or not REPOSITORY.fullmatch(name_or_path)):
        raise ConfigError(f"{name_or_path} is not a folder with a tokenizer", hint=hint)
    require_reachable(name_or_path, key)
    check_model_folder(path)
    if is_local:
        check_folder(path)  # the library reads the model's configuration to find the tokenizer's class
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if is_local else name_or_path,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            local_files_only=is_local or is_offline(),
        )
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(
            f"no tokenizer could be loaded from {name_or_path}: {reason_of(error)}", hint=hint
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {name_or_path} has no end-of-text token",
            hint="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """Add `tokens` as special tokens to `tokenizer`; existing ones keep their ids."""
    if tokens:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with at most `vocab_size` tokens on `documents`.

    Deterministic; decoding restores every text; the end-of-text token is `<|endoftext|>`. Raises
    `ConfigError` for a vocabulary too small for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"train_tokenizer_vocab_size={vocab_size} is too small",
            hint=f"set it to at least {SMALLEST_VOCABULARY}: all bytes and {END_OF_TEXT}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
