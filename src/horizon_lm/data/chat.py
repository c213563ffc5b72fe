"""Chat templates: render conversations, and find the characters that the assistant said.

Templates with `{% generation %}` marks delimit assistant turns. Most models' templates have none, which makes
their mask silently empty. Alternatives, in this order:

1. TRL's training variant of the template, if any (`trl.get_training_chat_template`);
2. the difference between the conversation before a turn, with the generation prompt, and after it: exact if
   both are prefixes of the whole text, which is checked for every turn.

If neither works, or fewer turns are marked than the assistant has, `DataError` is raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon_lm.data.examples import Chat, words_of
from horizon_lm.data.pictures import Picture
from horizon_lm.data.processor import Processor
from horizon_lm.data.template_limits import TemplateLimitError, limit
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.machine.libraries import before_peft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first character, one past the last

_BUILT_IN = Path(__file__).parent / "templates"
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_LARGEST_TEMPLATE = 1 << 20
_NO_MASK = "set chat_template to a .jinja file with {% generation %} marks around assistant turns, or "


def built_in_templates() -> list[str]:
    return sorted(path.stem for path in _BUILT_IN.glob("*.jinja"))


def read_template(name: str) -> str:
    """Read a built-in template by name, or a file. Raises ConfigError."""
    path = _BUILT_IN / f"{name}.jinja" if name in built_in_templates() else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template={name!r} is neither a file nor a built-in template",
            hint=f"use {', '.join(built_in_templates())}, a .jinja file, or null for the tokenizer's own",
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
            f"chat_template={name!r} cannot be read: {error}", hint="save it as UTF-8 text"
        ) from error


def without_marks(template: str) -> str:
    """Remove generation marks, which other programs do not know."""
    return _MARK.sub(lambda found: "{#" + found[1] + " " + found[2] + "#}", template)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans of assistant turns in order, one or more for each."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """The chat template of a tokenizer or a processor, or `template` (Jinja text) in its place.

    kwargs: further template variables, such as enable_thinking. processor: that of a vision-language model,
    whose templates take the content of messages in parts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        processor: Processor | None = None,
    ) -> None:
        own = tokenizer.chat_template if processor is None else processor.chat_template
        given = template or (own.get("default") if isinstance(own, dict) else own)
        self._in_parts = processor is not None
        if not given:
            raise DataError(
                "the data holds conversations, but the tokenizer has no chat template",
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
            owner = tokenizer if processor is None else processor.own
            self.template, self.source = _training_variant(owner, self.template)
        self._has_marks = bool(_MARK.search(self.template))
        self._knows_developer = "developer" in self.template
        self._kwargs = {**tokenizer.special_tokens_map, **(kwargs or {})}

    @property
    def key(self) -> str:
        """Everything that decides the text, for the cache."""
        return repr((self.template, sorted(self._kwargs.items(), key=str)))

    def prompt(self, messages: Sequence[dict[str, Any]], pictures: Sequence[Picture] = ()) -> str:
        """Render a prompt for the assistant's next turn."""
        chat = Chat(list(messages), pictures=tuple(pictures))
        return self._render(
            self._fitting(chat) if self._in_parts else chat.messages, None, "the prompt", ask=True
        )[0]

    def text(self, chat: Chat, place: str) -> str:
        """Render the whole conversation."""
        return self._render(self._fitting(chat), chat.tools, place)[0]

    def render(self, chat: Chat, place: str) -> Rendered:
        """Render the conversation, with the spans of assistant turns. Raises DataError naming `place`."""
        messages = self._fitting(chat)
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
        """Return the spans of the assistant's last turn."""
        messages = self._fitting(chat)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        if not self._has_marks or not last:
            return rendered.spans[-1:] if not self._has_marks else rendered.spans
        before, spans = self._render(messages[:last], chat.tools, place, ask=True)
        earlier = [span for span in spans if span[1] > span[0]]
        if rendered.spans[: len(earlier)] != earlier:
            raise DataError(
                f"{place}: the chat template renders earlier turns differently once more follow",
                hint="set loss_on: assistant, or another chat_template",
            )
        return rendered.spans[len(earlier) :]

    def prompt_and_whole(self, chat: Chat, place: str) -> tuple[str, str]:
        """Render (the prompt's messages with the generation prompt, the whole conversation) as TRL does for a
        prompt and its completion: by the template itself, not its training variant.

        The answer may deviate from the generation prompt (such as an opened thought) but not from the
        prompt's messages, or the user's words would count as completion. Raises DataError.
        """
        messages = self._fitting(chat)
        prompt = messages[: chat.num_prompt]
        whole = self._render(messages, chat.tools, place, own=True)[0]
        asked = self._render(prompt, chat.tools, place, ask=True, own=True)[0]
        if not whole.startswith(asked):
            alone = self._render(prompt, chat.tools, place, own=True)[0]
            if not whole.startswith(alone):
                raise DataError(
                    f"{place}: the chat template renders the prompt differently before an answer than alone",
                    hint="set loss_on: assistant, or another chat_template",
                )
        return asked, whole

    def _derived(self, messages: list[dict[str, Any]], turn: int, tools: Any, text: str, place: str) -> Span:
        through = self._render(messages[: turn + 1], tools, place)[0]
        if not turn:  # the assistant begins: there is no prompt
            before = self._before_opening(messages[0], tools, through, place)
        else:
            before = self._render(messages[:turn], tools, place, ask=True)[0]
        if before is None or not through.startswith(before) or not text.startswith(through):
            raise DataError(
                f"{place}: the chat template does not tell which tokens of message {turn + 1} are the "
                "assistant's: it has no {% generation %} marks, TRL has no training variant of it, and it "
                "renders earlier turns differently once more follow",
                hint=_NO_MASK + "loss_on: all",
            )
        return len(before), len(through)

    def _before_opening(self, opening: dict[str, Any], tools: Any, through: str, place: str) -> str | None:
        """Return what precedes the words of an assistant that speaks first; None: unknown.

        That is all up to its first word, or up to the end of a generation prompt before it.
        """
        trial = self._fitting(Chat([{"role": "user", "content": "first question"}]))
        alone, asked = (self._render(trial, tools, place, ask=ask)[0] for ask in (False, True))
        header = asked[len(alone) :] if asked.startswith(alone) else ""
        words = words_of(opening).strip()
        said = through.find(words) if words else len(through)
        at = through.rfind(header, 0, said) if header and said >= 0 else -1
        if at >= 0:
            return through[: at + len(header)]
        return through[:said] if words and said >= 0 else None

    def _fitting(self, chat: Chat) -> list[dict[str, Any]]:
        """Rename `developer`, a newer name of the system role, for templates that do not know it; put the
        content in parts, as TRL does, for the template of a processor."""
        messages = chat.messages
        if not self._knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if not self._in_parts:
            return messages
        before_peft()
        from trl.data_utils import prepare_multimodal_messages

        return list(prepare_multimodal_messages(messages, list(chat.pictures)))

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, place: str, *, ask: bool = False, own: bool = False
    ) -> tuple[str, list[Span]]:
        """Return (text, spans of generation marks). ask: add the generation prompt. own: use the template as
        given, without spans."""
        from transformers.utils.chat_template_utils import render_jinja_template

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
        except TemplateLimitError as error:  # not a bad row: each would take as long
            raise ConfigError(
                f"{self._name} was stopped at {place}: {error}",
                hint="use another chat_template, such as chatml",
            ) from error
        except Exception as error:  # a template may raise anything; report its own words
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{place}: the chat template rejects this conversation: {reason[:200]}",
                hint="check the order of roles, or set another chat_template or on_bad_row: skip",
            ) from error
        texts, spans = rendered
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if spans else []


def _training_variant(tokenizer: Any, template: str) -> tuple[str, str]:
    """Return (template to train with, source of the mask). tokenizer: or processor."""
    before_peft()
    from trl import get_training_chat_template

    with suppress(Exception):  # rendering reports the error
        limit(template)  # TRL renders it too
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        variant = get_training_chat_template(tokenizer)
    except Exception:  # ValueError for an unknown one; TRL's probes may raise others
        variant = None
    finally:
        tokenizer.chat_template = original
    if variant is None:
        return template, "differences between turns"
    return variant, "TRL's training variant of the template"


def check_template(chat: ChatTemplate) -> None:
    """Try the template on a conversation of two turns before reading data.

    Raises DataError if the mask would include the user's words or lack the assistant's.
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
            "the chat template's mask includes the user's words",
            hint="correct the {% generation %} marks of chat_template",
        )
