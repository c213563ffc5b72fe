"""From documents to blocks of token ids of one length.

The layout is the one that TRL calls "wrapped": all documents in one row, each closed by
the end-of-text token, cut every `max_length` tokens without regard to documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from horizon_lm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bounds on what is tokenised at once. A tokenizer needs some hundred bytes for each token of
# one text, so that a long text is cut, at a line's end, and a batch is kept small.
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 21

_Piece = tuple[str, bool, bool]  # text, whether it begins a document, whether it ends one


@dataclass(frozen=True)
class Packed:
    """`blocks` [n, T] of token ids (uint16 or uint32), and what went into it.

    `num_tokens` counts all tokens, the closing ones and the `dropped_tokens` of the last,
    partial block among them.
    """

    blocks: np.ndarray
    num_documents: int
    num_tokens: int
    dropped_tokens: int


def pack_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Packed:
    """Tokenise `documents` and cut them into blocks of `max_length` tokens.

    Needs, beside the result, no more memory than one batch of documents. A text beyond a
    million characters is tokenised in pieces cut after a line's end. Raises `DataError`
    if there are fewer tokens than one block.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    chunks: list[np.ndarray] = []
    num_documents = 0
    for batch in _batches(documents):
        num_documents += sum(is_last for _, _, is_last in batch)
        chunks.append(np.asarray(_tokenise(batch, tokenizer), dtype))
    num_tokens = sum(len(chunk) for chunk in chunks)
    num_blocks = num_tokens // max_length
    if num_blocks == 0:
        raise DataError(
            f"the data holds {num_tokens} tokens, less than one sequence of {max_length}",
            hint=f"give more text, or max_length={num_tokens}" if num_tokens > 1 else "give more text",
        )
    flat = np.empty(num_blocks * max_length, dtype)
    position = 0
    chunks.reverse()
    while chunks:  # each chunk is freed as it is copied, so that there is never a second whole
        chunk = chunks.pop()[: len(flat) - position]
        flat[position : position + len(chunk)] = chunk
        position += len(chunk)
    return Packed(
        blocks=flat.reshape(num_blocks, max_length),
        num_documents=num_documents,
        num_tokens=num_tokens,
        dropped_tokens=num_tokens - len(flat),
    )


def _batches(documents: Iterable[str]) -> Iterator[list[_Piece]]:
    """All pieces of all documents in order, in lists of some million characters."""
    batch: list[_Piece] = []
    characters = 0
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            characters += len(piece[0])
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[_Piece]:
    begin = 0
    while len(document) - begin > _PIECE_CHARACTERS:
        cut = document.rfind("\n", begin, begin + _PIECE_CHARACTERS) + 1 or begin + _PIECE_CHARACTERS
        yield document[begin:cut], begin == 0, False
        begin = cut
    yield document[begin:], begin == 0, True


def _tokenise(pieces: list[_Piece], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of `pieces` in one row, with what belongs before and after a document."""
    texts = [text for text, _, _ in pieces]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    start = _start_tokens(tokenizer)
    ids: list[int] = []
    for row, (_, is_first, is_last) in zip(rows, pieces, strict=True):
        if is_first:
            ids += start
        ids += row
        if is_last:
            ids.append(tokenizer.eos_token_id)
    return ids


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that this tokenizer puts before a text: [bos] or none."""
    added = tokenizer("").input_ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []
