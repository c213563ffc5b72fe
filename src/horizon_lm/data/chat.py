"""Conversations through a chat template: the text, and which characters of it the assistant said.

A template says itself what is the assistant's when it has `{% generation %}` marks. Most that models come
with have none, and a mask made from them is silently empty. Then, in this order:

1. TRL's training variant of the template, where it has one (`trl.get_training_chat_template`);
2. the difference between the conversation up to a turn, with the generation prompt, and through that turn:
   exact where each of the two is a beginning of the whole text, which is checked for every turn.

Where neither gives the mask, or fewer turns are marked than the assistant has, `DataError` is raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon_lm.data.formats import Chat
from horizon_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first character, one past the last

_BUILT_IN = Path(__file__).parent / "templates"
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_LARGEST_TEMPLATE = 1 << 20
_NO_MASK = "give chat_template a .jinja file with {% generation %} marks around what the assistant says, or "


def built_in_templates() -> list[str]:
    return sorted(path.stem for path in _BUILT_IN.glob("*.jinja"))


def read_template(name: str) -> str:
    """The text of a template: one of ours by its name, or a file. Raises ConfigError."""
    path = _BUILT_IN / f"{name}.jinja" if name in built_in_templates() else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template={name!r} is no file and no built-in template",
            hint=f"built in are {', '.join(built_in_templates())}; null takes the tokenizer's own",
        )
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise ConfigError(
            f"chat_template={name!r} is larger than {_LARGEST_TEMPLATE} bytes",
            hint="check the path",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={name!r} cannot be read: {error}", hint="a text file in UTF-8"
        ) from error


def without_marks(template: str) -> str:
    """The same template without its generation marks, which other programs do not know."""
    return _MARK.sub(lambda found: "{#" + found[1] + " " + found[2] + "#}", template)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans of the assistant's turns in order: one or more for each."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """Renders conversations with a tokenizer's template, or with `template` (Jinja text) in its place.

    kwargs: further variables of the template (enable_thinking, ...).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        own = tokenizer.chat_template
        given = template or (own.get("default") if isinstance(own, dict) else own)
        if not given:
            raise DataError(
                "the data are conversations, and the tokenizer has no chat template",
                hint="set chat_template to plain, alpaca, chatml or a .jinja file",
            )
        self._name = (
            "chat_template"
            if template
            else f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        )
        self.source = "generation marks"
        self.template = self._given = str(given)
        if not _MARK.search(self.template):
            self.template, self.source = _training_variant(tokenizer, self.template)
        self._has_marks = bool(_MARK.search(self.template))
        self._knows_developer = "developer" in self.template
        self._kwargs = {**tokenizer.special_tokens_map, **(kwargs or {})}

    @property
    def key(self) -> str:
        """Everything that the text depends on, for the cache."""
        return repr((self.template, sorted(self._kwargs.items(), key=str)))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        """The text that asks the assistant for its next turn."""
        return self._render(list(messages), tools, "the prompt", ask=True)[0]

    def text(self, chat: Chat, place: str) -> str:
        """The whole conversation."""
        return self._render(self._fitting(chat.messages), chat.tools, place)[0]

    def render(self, chat: Chat, place: str) -> Rendered:
        """The conversation and the spans of the assistant's turns. Raises DataError naming the place."""
        messages = self._fitting(chat.messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, spans = self._render(messages, chat.tools, place)
        if self._has_marks:
            spans = [span for span in spans if span[1] > span[0]]
            if len(spans) < len(turns):
                raise DataError(
                    f"{place}: the chat template marks {len(spans)} of {len(turns)} assistant turns",
                    hint=_NO_MASK + "loss_on: all",
                )
            return Rendered(text, spans)
        return Rendered(text, [self._derived(messages, turn, chat.tools, text, place) for turn in turns])

    def last_turn(self, chat: Chat, rendered: Rendered, place: str) -> list[Span]:
        """Of the spans, those of the assistant's last turn."""
        messages = self._fitting(chat.messages)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        if not self._has_marks or not last:
            return rendered.spans[-1:] if not self._has_marks else rendered.spans
        before, spans = self._render(messages[:last], chat.tools, place, ask=True)
        earlier = [span for span in spans if span[1] > span[0]]
        if rendered.spans[: len(earlier)] != earlier:
            raise DataError(
                f"{place}: the chat template writes earlier turns another way once more follow",
                hint="loss_on: assistant, or another chat_template",
            )
        return rendered.spans[len(earlier) :]

    def prompt_and_whole(self, chat: Chat, place: str) -> tuple[str, str]:
        """(the prompt's messages with the generation prompt, the whole conversation), as TRL renders them for
        a prompt and its completion: by the template itself, not by its training variant.

        The generation prompt may go on in another way than the answer (opening a thought, say); the prompt's
        messages may not, as then the user's words would be counted to the completion. Raises DataError.
        """
        messages = self._fitting(chat.messages)
        prompt = messages[: chat.num_prompt]
        whole = self._render(messages, chat.tools, place, own=True)[0]
        asked = self._render(prompt, chat.tools, place, ask=True, own=True)[0]
        if not whole.startswith(asked):
            alone = self._render(prompt, chat.tools, place, own=True)[0]
            if not whole.startswith(alone):
                raise DataError(
                    f"{place}: the chat template writes the prompt another way before an answer than alone",
                    hint="loss_on: assistant, or another chat_template",
                )
        return asked, whole

    def _derived(self, messages: list[dict[str, Any]], turn: int, tools: Any, text: str, place: str) -> Span:
        through = self._render(messages[: turn + 1], tools, place)[0]
        if not turn:  # the assistant begins: there is nothing to ask with
            before = self._before_opening(messages[0], tools, through, place)
        else:
            before = self._render(messages[:turn], tools, place, ask=True)[0]
        if before is None or not through.startswith(before) or not text.startswith(through):
            raise DataError(
                f"{place}: the chat template cannot say which tokens of message {turn + 1} are the "
                "assistant's: it has no {% generation %} marks, TRL has no training variant of it, and it "
                "writes earlier turns another way once more follow",
                hint=_NO_MASK + "loss_on: all",
            )
        return len(before), len(through)

    def _before_opening(self, opening: dict[str, Any], tools: Any, through: str, place: str) -> str | None:
        """What stands in `through` before the words of an assistant that speaks first; None: not known.

        All up to its first word, or up to the generation prompt's end where that stands before it.
        """
        trial = [{"role": "user", "content": "first question"}]
        alone, asked = (self._render(trial, tools, place, ask=ask)[0] for ask in (False, True))
        header = asked[len(alone) :] if asked.startswith(alone) else ""
        words = opening["content"].strip()
        said = through.find(words) if words else len(through)
        at = through.rfind(header, 0, said) if header and said >= 0 else -1
        if at >= 0:
            return through[: at + len(header)]
        return through[:said] if words and said >= 0 else None

    def _fitting(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`developer`, a newer name of the system role, for templates that do not know it."""
        if self._knows_developer:
            return messages
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, place: str, *, ask: bool = False, own: bool = False
    ) -> tuple[str, list[Span]]:
        """(text, spans of generation marks). ask: with the generation prompt. own: by the template as it was
        given, without spans."""
        from transformers.utils.chat_template_utils import render_jinja_template

        from horizon_lm.data.template_limits import TemplateLimitError, limit

        try:
            limit(self._given if own else self.template)
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._given if own else self.template,
                return_assistant_tokens_mask=self._has_marks and not own,
                add_generation_prompt=ask,
                **self._kwargs,
            )
        except TemplateLimitError as error:  # no matter which row: each would take as long
            raise ConfigError(
                f"{self._name} was stopped at {place}: {error}",
                hint="use another chat_template, such as chatml",
            ) from error
        except Exception as error:  # a template may raise anything; its own words are the news
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{place}: the chat template refuses this conversation: {reason[:200]}",
                hint="check the order of the roles; another chat_template, or on_bad_row: skip",
            ) from error
        texts, spans = rendered
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if spans else []


def _training_variant(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """(template to train with, how the mask is had)."""
    from trl import get_training_chat_template

    from horizon_lm.data.template_limits import limit

    with suppress(Exception):  # rendering says what is wrong with it
        limit(template)  # TRL renders it, too
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        variant = get_training_chat_template(tokenizer)
    except Exception:  # ValueError for one that TRL does not know; its probes may raise others
        variant = None
    finally:
        tokenizer.chat_template = original
    if variant is None:
        return template, "differences between turns"
    return variant, "TRL's training variant of the template"


def check_template(chat: ChatTemplate) -> None:
    """Tries the template on a conversation of two turns, before any data is read.

    Raises DataError where the mask of a turn would hold the user's words or lack the assistant's.
    """
    said = ["first answer", "second answer"]
    messages = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": said[1]},
    ]
    rendered = chat.render(Chat(messages), "a trial conversation")
    learned = [rendered.text[begin:end] for begin, end in rendered.spans]
    for turn, answer in enumerate(said):
        if not any(answer in part for part in learned):
            raise DataError(
                f"the chat template leaves assistant turn {turn + 1} of a trial conversation out of the mask",
                hint=_NO_MASK + "loss_on: all",
            )
    if any("question" in part for part in learned):
        raise DataError(
            "the chat template's mask holds the user's words",
            hint="correct the {% generation %} marks of chat_template",
        )
