"""From examples to token ids and, beside them, which tokens are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from horizon_lm.data.chat import ChatTemplate, Span, check_template, read_template
from horizon_lm.data.documents import Placed
from horizon_lm.data.formats import Chat, Pair, Text
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.io.leftovers import temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer needs some hundred bytes for each token of one text: a long text is cut at a line's end.
_PIECE_CHARACTERS = 1 << 20
# To be raised when the same input is to give other tokens or another mask. 2: a completion begins where the
# tokens of prompt and completion leave those of the prompt.
_FORMAT = 2

Tokens = tuple[list[int], list[Span]]  # ids, and the characters of each where they were asked for
Finished = tuple[list[int], np.ndarray | None]  # ids, and which are trained on; None: all


@dataclass(frozen=True)
class Encoded:
    """The tokens of one document. `trained` [tokens] of bool; None: all are."""

    ids: np.ndarray
    trained: np.ndarray | None
    place: str
    dataset: int
    is_text: bool


@dataclass(frozen=True)
class _Job:
    """What an example needs of the tokenizer: `texts`, with offsets or not; `finish` takes their tokens."""

    texts: tuple[str, ...]
    finish: Callable[..., Finished]
    with_offsets: bool = False


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
        self._is_checked = False
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        added = tokenizer("").input_ids
        self._start = added[:1] if added and added[0] == tokenizer.bos_token_id else []
        self._end = [tokenizer.eos_token_id]
        self._before, self._after = _special_around(tokenizer)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises DataError and ConfigError."""
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer, self._template_text, self._template_kwargs)
        return self._chat

    @property
    def _marking_chat(self) -> ChatTemplate:
        """The chat template, tried out at its first use on whether it can say what the assistant said."""
        if not self._is_checked:
            if not self.tokenizer.is_fast:
                raise ConfigError(
                    "this tokenizer cannot say which characters its tokens stand for, as a mask needs",
                    hint="use a model with a tokenizer.json",
                )
            check_template(self.chat)
            self._is_checked = True
        return self.chat

    @property
    def chat_template_to_save(self) -> str | None:
        """The template that was given in place of the tokenizer's own, as it is to be used later."""
        return self._template_text

    def key(self, format: int = _FORMAT, *, by_name: bool = False) -> str:
        """A hash of everything that decides on the tokens of an example.

        format: an earlier version's. by_name: as versions before 28 November 2026 made it of a tokenizer
        written in Python (of its name and size), and of one that splits special tokens (as if it did not).
        """
        tokenizer: Any = self.tokenizer
        if by_name:
            backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        else:
            backend = _content_of(tokenizer)
        parts = (backend, self._start, self._end, sorted(tokenizer.special_tokens_map.items(), key=str))
        template = (
            self._template_text,
            tokenizer.chat_template,
            sorted(self._template_kwargs.items(), key=str),
        )
        made_by = (format, version("trl"))  # TRL decides on the training variants of templates
        return xxhash.xxh3_128(repr((parts, template, self._loss_on, made_by)).encode()).hexdigest()

    def encode(self, batch: Sequence[Placed]) -> list[Encoded | DataError]:
        """The tokens of each example of `batch`, or why it cannot be trained on, in order.

        Raises DataError and ConfigError where the chat template, not the example, is at fault.
        """
        self.get_ready(batch)
        results: list[Encoded | DataError | None] = [None] * len(batch)
        jobs: list[tuple[int, _Job]] = []  # place in `results`, and what is to be done for it
        for i, placed in enumerate(batch):
            try:
                jobs.append((i, self._job(placed)))
            except DataError as error:
                results[i] = error
        texts = [text for _, job in jobs for text in job.texts]
        if texts:
            with_offsets = any(job.with_offsets for _, job in jobs)
            tokens = iter(_tokenised(self.tokenizer, texts, with_offsets=with_offsets))
            for i, job in jobs:
                own = [next(tokens) for _ in job.texts]
                try:
                    results[i] = self._encoded(*job.finish(*own), batch[i])
                except DataError as error:
                    results[i] = error
        return [result for result in results if result is not None]

    def get_ready(self, batch: Sequence[Placed]) -> None:
        """Try the chat template out, if `batch` needs it."""
        for placed in batch:
            if isinstance(placed.example, Chat):
                _ = self._marking_chat if self._loss_of(placed.example) in _BY_TURNS else self.chat

    def _encoded(self, ids: list[int], trained: np.ndarray | None, placed: Placed) -> Encoded:
        if trained is not None and not trained.any():
            raise DataError(
                f"{placed.place} has no token to train on",
                hint="the assistant says nothing in it; remove it, or on_bad_row: skip",
            )
        is_text = isinstance(placed.example, Text)
        return Encoded(np.asarray(ids, self.dtype), trained, placed.place, placed.dataset, is_text)

    def _job(self, placed: Placed) -> _Job:
        example = placed.example
        if isinstance(example, Text):
            return _Job((example.text,), lambda tokens: ([*self._start, *tokens[0], *self._end], None))
        if isinstance(example, Pair):
            return self._job_of_pair(example)
        return self._job_of_chat(example, placed.place)

    def _job_of_pair(self, pair: Pair) -> _Job:
        """As TRL's SFTTrainer prepares it, to the token: the end of a text is written unless it is there, and
        both texts get the special tokens that the tokenizer puts around a text."""
        end = str(self.tokenizer.eos_token)
        completion = pair.completion if pair.completion.endswith(end) else pair.completion + end
        whole = pair.prompt + completion
        if self._loss_on == "all":
            return _Job((whole,), lambda tokens: (self._around(tokens[0]), None))
        return _Job(
            (pair.prompt, whole),
            lambda prompt, tokens: _from_border(self._around(prompt[0]), self._around(tokens[0])),
        )

    def _around(self, ids: list[int]) -> list[int]:
        return [*self._before, *ids, *self._after]

    def _loss_of(self, chat: Chat) -> str:
        """What is trained on, with `auto` made out."""
        if self._loss_on == "auto":
            return "completion" if chat.num_prompt else "assistant"
        return self._loss_on

    def _job_of_chat(self, chat: Chat, place: str) -> _Job:
        loss_on = self._loss_of(chat)
        if loss_on == "all":
            return _Job((self.chat.text(chat, place),), lambda tokens: (tokens[0], None))
        if loss_on == "completion":
            if not chat.num_prompt:
                raise DataError(
                    f"{place} is a conversation without a prompt column, which loss_on: completion needs",
                    hint="loss_on: assistant, or last_assistant",
                )
            texts = self.chat.prompt_and_whole(chat, place)
            return _Job(texts, lambda prompt, tokens: _from_border(prompt[0], tokens[0]))
        rendered = self.chat.render(chat, place)
        spans = rendered.spans
        if loss_on == "last_assistant":
            spans = self.chat.last_turn(chat, rendered, place)
        return _Job(
            (rendered.text,), lambda tokens: (tokens[0], covered(tokens[1], spans)), with_offsets=True
        )


_BY_TURNS = frozenset({"assistant", "last_assistant"})


def _from_border(prompt: list[int], whole: list[int]) -> Finished:
    """`whole`, trained on from where it leaves `prompt`: a token that straddles the border is trained on.

    The border is that of TRL (`trl.data_utils.common_prefix_length`).
    """
    same = 0
    for one, other in zip(prompt, whole, strict=False):
        if one != other:
            break
        same += 1
    return whole, np.arange(len(whole)) >= same


def _content_of(tokenizer: Any) -> str:
    """What a tokenizer is, apart from the special tokens that it names: JSON, or a hash of its files."""
    if tokenizer.is_fast:
        backend = str(tokenizer.backend_tokenizer.to_str())  # does not say whether special tokens are split
        return backend + ("split_special_tokens" if tokenizer.split_special_tokens else "")
    digest = xxhash.xxh3_128(type(tokenizer).__name__.encode())
    with temporary_folder("horizon-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after one text."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    for begin in range(len(full) - len(bare) + 1):
        if bare and full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    return [], []


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
) -> list[Tokens]:
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
    rows: list[Tokens] = [([], []) for _ in texts]
    for k, (i, begin) in enumerate(owners):
        ids, offsets = rows[i]
        ids += out.input_ids[k]
        if with_offsets:
            found = out.offset_mapping[k]
            offsets += found if begin == 0 else [(a + begin, b + begin) for a, b in found]
    return rows
