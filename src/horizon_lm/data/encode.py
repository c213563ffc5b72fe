"""Encoding of examples: token ids, and which tokens are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from horizon_lm.data.chat import ChatTemplate, Span, check_template, read_template
from horizon_lm.data.documents import Placed
from horizon_lm.data.examples import Answered, Chat, Labelled, Pair, Preference, Text, sides
from horizon_lm.data.picture_table import Shown
from horizon_lm.data.pictures import BadPictureError, Picture, open_picture
from horizon_lm.data.processor import OUTSIDE, Processor
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.io.leftovers import temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers need some hundred bytes per token of one text, so long texts are cut at line ends.
_PIECE_CHARACTERS = 1 << 20
# Increment when the same input gives other tokens or another mask. 2: a completion begins at the first token
# that differs from the tokenised prompt.
_FORMAT = 2

Tokens = tuple[list[int], list[Span]]  # ids, and the character span of each if requested
Finished = tuple[list[int], np.ndarray | None]  # ids, and the loss mask; None: all are trained on


@dataclass(frozen=True)
class Encoded:
    """Tokens of one document. trained: [tokens] of bool; None: all. label: of a labelled sample. pictures: in
    the order of their placeholders."""

    ids: np.ndarray
    trained: np.ndarray | None
    place: str
    dataset: int
    is_text: bool
    label: bool | None = None
    pictures: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class _Job:
    """Texts to tokenise for an example, with or without offsets; `finish` takes their tokens and returns
    those of its documents. pictures: of each text, the first ones that its marks stand for."""

    texts: tuple[str, ...]
    finish: Callable[..., list[Finished]]
    with_offsets: bool = False
    pictures: tuple[Picture, ...] = ()


class Encoder:
    """Tokenizer of examples; `key` identifies everything that decides the tokens.

    loss_on: auto | all | completion | assistant | last_assistant. auto trains on every token of a text, on
    completions of pairs, and on every assistant turn. processor: of a vision-language model, for rows with
    pictures; placeholders are never trained on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss_on: str = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        processor: Processor | None = None,
    ) -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self._loss_on = loss_on
        self._template_text = None if chat_template is None else read_template(chat_template)
        if chat_template == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            raise ConfigError(
                "chat_template=chatml ends turns with <|im_end|>, which is not a token of this tokenizer",
                hint="set chat_template=plain, which ends turns with the end-of-text token",
            )
        self._template_kwargs = chat_template_kwargs or {}
        self._chat: ChatTemplate | None = None
        self._is_checked = False
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        added = tokenizer("").input_ids
        self._start = added[:1] if added and added[0] == tokenizer.bos_token_id else []
        self._end = [tokenizer.eos_token_id]
        self._before, self._after = special_around(tokenizer)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises DataError and ConfigError."""
        if self._chat is None:
            options = (self._template_text, self._template_kwargs, self.processor)
            self._chat = ChatTemplate(self.tokenizer, *options)
        return self._chat

    @property
    def _marking_chat(self) -> ChatTemplate:
        """The chat template, checked at first use: it must tell what the assistant said."""
        if not self._is_checked:
            if not self.tokenizer.is_fast:
                raise ConfigError(
                    "this tokenizer cannot map its tokens to characters, which the loss mask needs",
                    hint="use a model with a tokenizer.json",
                )
            check_template(self.chat)
            self._is_checked = True
        return self.chat

    @property
    def chat_template_to_save(self) -> str | None:
        """The template given in place of the tokenizer's own, to save with the model."""
        return self._template_text

    def key(self, format: int = _FORMAT, *, by_name: bool = False) -> str:
        """Hash everything that decides the tokens of an example.

        format: that of an earlier version. by_name: as before 28 November 2026, when tokenizers written in
        Python were identified by name and size, and `split_special_tokens` was ignored.
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
        made_by = (format, version("trl"))  # TRL provides training variants of templates
        seen = () if self.processor is None else (self.processor.key, self.processor.chat_template)
        return xxhash.xxh3_128(repr((parts, template, self._loss_on, made_by, *seen)).encode()).hexdigest()

    def encode(self, batch: Sequence[Placed]) -> list[Encoded | DataError]:
        """Encode each example of `batch`, in order, a preference as two documents; an unusable one gives its
        error.

        Raises DataError and ConfigError if the chat template, not the example, is at fault.
        """
        self.get_ready(batch)
        results: list[list[Encoded] | DataError] = [[] for _ in batch]
        jobs: list[tuple[int, _Job]] = []  # by index in `results`
        for i, placed in enumerate(batch):
            try:
                jobs.append((i, self._job(placed)))
            except DataError as error:
                results[i] = error
        texts = [text for _, job in jobs for text in job.texts if not job.pictures]
        with_offsets = any(job.with_offsets for _, job in jobs)
        tokens = iter(_tokenised(self.tokenizer, texts, with_offsets=with_offsets) if texts else ())
        for i, job in jobs:
            own = [next(tokens) for _ in job.texts] if not job.pictures else []
            try:
                if job.pictures:
                    results[i] = self._with_pictures(job, batch[i])
                else:
                    results[i] = self._encoded(job.finish(*own), batch[i])
            except DataError as error:
                if isinstance(error, BadPictureError):
                    error.files = tuple(p.path for p in job.pictures if p.path is not None)
                results[i] = error
        return [found for result in results for found in (result if isinstance(result, list) else [result])]

    def get_ready(self, batch: Sequence[Placed]) -> None:
        """Check the chat template if `batch` needs it."""
        for placed in batch:
            if isinstance(placed.example, Chat):
                _ = self._marking_chat if self._loss_of(placed.example) in _BY_TURNS else self.chat
            elif isinstance(next(iter(sides(placed.example)), None), Chat):
                _ = self.chat

    def _encoded(self, documents: list[Finished], placed: Placed) -> list[Encoded]:
        for _, trained in documents:
            if trained is not None and not trained.any():
                raise DataError(
                    f"{placed.place} has no token to train on, as the assistant says nothing",
                    hint="remove it, or set on_bad_row: skip",
                )
        example = placed.example
        if isinstance(example, Preference) and documents[0][0] == documents[1][0]:
            raise DataError(
                f"{placed.place}: 'chosen' and 'rejected' become the same tokens",
                hint="remove the row, or set on_bad_row: skip",
            )
        label = example.label if isinstance(example, Labelled) else None
        is_text = isinstance(example, Text)
        return [
            Encoded(np.asarray(ids, self.dtype), trained, placed.place, placed.dataset, is_text, label)
            for ids, trained in documents
        ]

    def _with_pictures(self, job: _Job, placed: Placed) -> list[Encoded]:
        """Encode a conversation with pictures. Raises DataError, also for a bad picture."""
        assert self.processor is not None
        opened = [open_picture(picture, placed.place) for picture in job.pictures]
        own = []
        for text in job.texts:  # a prompt, then the whole conversation; the answer may have pictures as well
            found = self.processor.tokens(text, opened[: text.count(self.processor.mark)], placed.place)
            own.append(found)
        whole = own[-1]
        if len(whole.counts) != len(opened):
            raise self.processor.marks_differ(len(whole.counts), len(opened), placed.place)
        shown = np.array([span != OUTSIDE for span in whole.offsets])
        finished = [
            (ids, shown if trained is None else trained & shown)
            for ids, trained in job.finish(*((part.ids, part.offsets) for part in own))
        ]
        pictures = tuple(
            Shown.of(*parts) for parts in zip(job.pictures, opened, whole.counts, whole.sizes, strict=True)
        )
        return [replace(found, pictures=pictures) for found in self._encoded(finished, placed)]

    def _job(self, placed: Placed) -> _Job:
        """Prepare an example. Raises DataError."""
        job = self._prepared(placed)
        pictures = placed.example.pictures if isinstance(placed.example, Chat) else ()
        if pictures and self.processor is None:
            raise DataError(
                f"{placed.place} has pictures, and the first rows of the data have none",
                hint="move a row with pictures among the first of its dataset",
            )
        if self.processor is not None and not pictures and any(self.processor.mark in t for t in job.texts):
            raise self.processor.marks_differ(1, 0, placed.place)
        return replace(job, pictures=pictures)

    def _prepared(self, placed: Placed) -> _Job:
        example = placed.example
        if isinstance(example, Text):
            return _Job((example.text,), lambda tokens: [([*self._start, *tokens[0], *self._end], None)])
        if isinstance(example, Chat):
            return self._job_of_chat(example, placed.place)
        if isinstance(example, Pair) and self._loss_on == "all":
            _, whole = self._prompt_and_whole(example, placed.place)
            return _Job((whole,), lambda tokens: [(self._around(tokens[0]), None)])
        answered = (example,) if isinstance(example, Pair) else sides(example)
        return self._job_of_sides(answered, placed.place)

    def _job_of_sides(self, answered: Sequence[Answered], place: str) -> _Job:
        """Prepare completions of one prompt exactly as TRL's trainers do."""
        around = self._around if isinstance(answered[0], Pair) else list
        texts = [self._prompt_and_whole(side, place) for side in answered]
        return _Job(
            (texts[0][0], *(whole for _, whole in texts)),
            lambda prompt, *wholes: _from_border(around(prompt[0]), [around(whole[0]) for whole in wholes]),
        )

    def _prompt_and_whole(self, answered: Answered, place: str) -> tuple[str, str]:
        """Return (prompt, prompt and completion). To text, append the end-of-text token unless present; add
        the tokenizer's special tokens around both later."""
        if isinstance(answered, Chat):
            return self.chat.prompt_and_whole(answered, place)
        end = str(self.tokenizer.eos_token)
        completion = answered.completion if answered.completion.endswith(end) else answered.completion + end
        return answered.prompt, answered.prompt + completion

    def _around(self, ids: list[int]) -> list[int]:
        return [*self._before, *ids, *self._after]

    def _loss_of(self, chat: Chat) -> str:
        """Resolve `auto`."""
        if self._loss_on == "auto":
            return "completion" if chat.num_prompt else "assistant"
        return self._loss_on

    def _job_of_chat(self, chat: Chat, place: str) -> _Job:
        loss_on = self._loss_of(chat)
        if loss_on == "all":
            return _Job((self.chat.text(chat, place),), lambda tokens: [(tokens[0], None)])
        if loss_on == "completion":
            if not chat.num_prompt:
                raise DataError(
                    f"{place} is a conversation without a prompt column, which loss_on: completion needs",
                    hint="set loss_on: assistant or last_assistant",
                )
            return self._job_of_sides([chat], place)
        rendered = self.chat.render(chat, place)
        spans = rendered.spans
        if loss_on == "last_assistant":
            spans = self.chat.last_turn(chat, rendered, place)
        return _Job(
            (rendered.text,), lambda tokens: [(tokens[0], covered(tokens[1], spans))], with_offsets=True
        )


_BY_TURNS = frozenset({"assistant", "last_assistant"})


def _from_border(prompt: list[int], wholes: list[list[int]]) -> list[Finished]:
    """Train on each of `wholes` from the first token at which one of them differs from `prompt`, so a token
    across the border counts, and all of them have the same prompt.

    The border is TRL's (`trl.data_utils.common_prefix_length`, the least for the two of a preference).
    """
    border = min(_num_shared(prompt, whole) for whole in wholes)
    return [(whole, np.arange(len(whole)) >= border) for whole in wholes]


def _num_shared(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _content_of(tokenizer: Any) -> str:
    """Identify a tokenizer, except for its named special tokens: by JSON, or by a hash of its files."""
    if tokenizer.is_fast:
        backend = str(tokenizer.backend_tokenizer.to_str())  # lacks split_special_tokens
        return backend + ("split_special_tokens" if tokenizer.split_special_tokens else "")
    digest = xxhash.xxh3_128(type(tokenizer).__name__.encode())
    with temporary_folder("horizon-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    for begin in range(len(full) - len(bare) + 1):
        if bare and full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    return [], []


def covered(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Mark tokens that hold a character of one of `spans`; offsets: [tokens] of (first, one past the last).

    Many byte-level tokenizers trim white space from offsets: a token of white space alone has an empty span
    at its end.
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
    """Return (ids, offsets) of each text, without special tokens; offsets only if requested."""
    pieces: list[str] = []
    owners: list[tuple[int, int]] = []  # text, and the piece's first character in it
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
