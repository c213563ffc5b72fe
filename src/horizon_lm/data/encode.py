"""From examples to token ids and, beside them, which tokens are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from horizon_lm.data.chat import ChatTemplate, Span, check_template, read_template
from horizon_lm.data.documents import Placed
from horizon_lm.data.formats import Chat, Pair, Text
from horizon_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer needs some hundred bytes for each token of one text: a long text is cut at a line's end.
_PIECE_CHARACTERS = 1 << 20
_FORMAT = 1  # to be raised when the same input is to give other tokens


@dataclass(frozen=True)
class Encoded:
    """The tokens of one document. `trained` [tokens] of bool; None: all are."""

    ids: np.ndarray
    trained: np.ndarray | None
    place: str
    dataset: int
    is_text: bool


class Encoder:
    """Tokenises examples. The same settings and tokenizer give the same tokens (`key`).

    loss_on: auto | all | completion | assistant | last_assistant. auto trains on every token of a text, on
    the completion of a pair, on every turn of the assistant.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss_on: str = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._loss_on = loss_on
        self._template_text = None if chat_template is None else read_template(chat_template)
        if chat_template == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            raise ConfigError(
                "chat_template=chatml ends a turn with <|im_end|>, which is no token of this tokenizer",
                hint="chat_template=plain ends it with the end-of-text token, which every tokenizer has",
            )
        self._template_kwargs = chat_template_kwargs or {}
        self._chat: ChatTemplate | None = None
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        added = tokenizer("").input_ids
        self._start = added[:1] if added and added[0] == tokenizer.bos_token_id else []
        self._end = [tokenizer.eos_token_id]

    @property
    def chat(self) -> ChatTemplate:
        """The chat template, tried out at its first use. Raises DataError and ConfigError."""
        if self._chat is None:
            if not self.tokenizer.is_fast:
                raise ConfigError(
                    "this tokenizer cannot say which characters its tokens stand for, as a mask needs",
                    hint="use a model with a tokenizer.json",
                )
            chat = ChatTemplate(self.tokenizer, self._template_text, self._template_kwargs)
            if self._loss_on != "all":
                check_template(chat)
            self._chat = chat
        return self._chat

    @property
    def chat_template_to_save(self) -> str | None:
        """The template that was given in place of the tokenizer's own, as it is to be used later."""
        return self._template_text

    def key(self) -> str:
        """A hash of everything that decides on the tokens of an example."""
        tokenizer: Any = self.tokenizer
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        parts = (backend, self._start, self._end, sorted(tokenizer.special_tokens_map.items(), key=str))
        template = (
            self._template_text,
            tokenizer.chat_template,
            sorted(self._template_kwargs.items(), key=str),
        )
        made_by = (_FORMAT, version("trl"))  # TRL decides on the training variants of templates
        return xxhash.xxh3_128(repr((parts, template, self._loss_on, made_by)).encode()).hexdigest()

    def encode(self, batch: Sequence[Placed]) -> list[Encoded | DataError]:
        """The tokens of each example of `batch`, or why it cannot be trained on, in order.

        Raises DataError and ConfigError where the chat template, not the example, is at fault.
        """
        self.get_ready(batch)
        results: list[Encoded | DataError | None] = [None] * len(batch)
        texts: list[str] = []
        jobs: list[tuple[int, Any]] = []  # place in `results`, and what finishes it
        for i, placed in enumerate(batch):
            try:
                text, finish = self._prepared(placed)
            except DataError as error:
                results[i] = error
                continue
            jobs.append((i, finish))
            texts.append(text)
        if texts:
            needs_offsets = any(not isinstance(batch[i].example, Text) for i, _ in jobs)
            rows = _tokenised(self.tokenizer, texts, with_offsets=needs_offsets)
            for (i, finish), row in zip(jobs, rows, strict=True):
                try:
                    ids, trained = finish(*row)
                    results[i] = self._encoded(ids, trained, batch[i])
                except DataError as error:
                    results[i] = error
        return [result for result in results if result is not None]

    def get_ready(self, batch: Sequence[Placed]) -> None:
        """Try the chat template out, if `batch` needs it."""
        if any(isinstance(placed.example, Chat) for placed in batch):
            _ = self.chat

    def _encoded(self, ids: list[int], trained: np.ndarray | None, placed: Placed) -> Encoded:
        if trained is not None and not trained.any():
            raise DataError(
                f"{placed.place} has no token to train on",
                hint="the assistant says nothing in it; remove it, or on_bad_row: skip",
            )
        is_text = isinstance(placed.example, Text)
        return Encoded(np.asarray(ids, self.dtype), trained, placed.place, placed.dataset, is_text)

    def _prepared(self, placed: Placed) -> tuple[str, Any]:
        """The text of an example, and a function from its tokens and their offsets to (ids, trained)."""
        example = placed.example
        if isinstance(example, Text):
            return example.text, self._finish_text
        if isinstance(example, Pair):
            return self._prepared_pair(example)
        return self._prepared_chat(example, placed.place)

    def _finish_text(self, ids: list[int], offsets: Any) -> tuple[list[int], None]:
        return [*self._start, *ids, *self._end], None

    def _prepared_pair(self, pair: Pair) -> tuple[str, Any]:
        border = len(pair.prompt)
        everything = self._loss_on == "all"

        def finish(ids: list[int], offsets: list[Span]) -> tuple[list[int], np.ndarray | None]:
            # A token that begins in the prompt is the prompt's, as it would be were the prompt alone.
            inside = [True] * len(ids) if everything else [begin >= border for begin, _ in offsets]
            trained = np.array([everything] * len(self._start) + inside + [True])
            return [*self._start, *ids, *self._end], None if everything else trained

        return pair.prompt + pair.completion, finish

    def _prepared_chat(self, chat: Chat, place: str) -> tuple[str, Any]:
        loss_on = self._loss_on
        if loss_on == "auto":
            loss_on = "completion" if chat.num_prompt else "assistant"
        if loss_on == "completion" and not chat.num_prompt:
            raise DataError(
                f"{place} is a conversation without a prompt column, which loss_on: completion needs",
                hint="loss_on: assistant, or last_assistant",
            )
        if loss_on == "all":
            return self.chat.text(chat, place), lambda ids, offsets: (ids, None)
        if loss_on == "completion":
            text = self.chat.text(chat, place)
            spans = [(self.chat.completion_start(chat, text, place), len(text))]
        else:
            rendered = self.chat.render(chat, place)
            text, spans = rendered.text, rendered.spans
            if loss_on == "last_assistant":
                spans = self.chat.last_turn(chat, rendered, place)
        return text, lambda ids, offsets: (ids, covered(offsets, spans))


def covered(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens hold a character of one of `spans`; offsets [tokens] of (first, one past the last).

    Many byte-level tokenizers trim white space from their offsets, so that a token of nothing else has
    none left: it stands at its end.
    """
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
    is_space = first == last
    inside = np.zeros(len(first), bool)
    for begin, end in spans:
        inside |= np.where(is_space, (last > begin) & (last <= end), (last > begin) & (first < end))
    return inside


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, with_offsets: bool
) -> list[tuple[list[int], list[Span]]]:
    """(ids, offsets) of each text, without special tokens; offsets are empty unless asked for."""
    pieces: list[str] = []
    owners: list[tuple[int, int]] = []  # text, and its character at which the piece begins
    for i, text in enumerate(texts):
        begin = 0
        while len(text) - begin > _PIECE_CHARACTERS:
            cut = text.rfind("\n", begin, begin + _PIECE_CHARACTERS) + 1 or begin + _PIECE_CHARACTERS
            pieces.append(text[begin:cut])
            owners.append((i, begin))
            begin = cut
        pieces.append(text[begin:])
        owners.append((i, begin))
    out = tokenizer(
        pieces,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )
    rows: list[tuple[list[int], list[Span]]] = [([], []) for _ in texts]
    for k, (i, begin) in enumerate(owners):
        ids, offsets = rows[i]
        ids += out.input_ids[k]
        if with_offsets:
            found = out.offset_mapping[k]
            offsets += found if begin == 0 else [(a + begin, b + begin) for a, b in found]
    return rows
