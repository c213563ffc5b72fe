"""Rows of preferences: pairs of a better and a worse completion, and completions with a label.

| prompt                          | chosen, rejected; or completion | as in                  |
|---------------------------------|---------------------------------|------------------------|
| prompt: text                    | text                            | TRL, Axolotl           |
| prompt: messages                | messages                        | TRL                    |
| none: the beginning of both     | text, or messages               | TRL, Axolotl           |
| instruction, question or input  | text (or chosen_response)       | LLaMA-Factory, Axolotl |
| messages or conversations       | a message, messages, or text    | LLaMA-Factory, Axolotl |

Labelled rows have one completion (or `output`, or the last message) and a `label` (or `kto_tag`). `system`
and `tools` belong to conversations. Text with a `prompt`, or none, is trained on as it is; all else by the
chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from horizon_lm.data.examples import Answered, Chat, Labelled, Pair, Preference
from horizon_lm.data.messages import (
    CORRECT,
    NULL,
    REMOVE,
    asked,
    checked_text,
    listed,
    read_messages,
    read_tools,
    with_system,
)
from horizon_lm.data.readers import kind
from horizon_lm.errors import DataError

LABELS = ("label", "kto_tag")
PAIR_COLUMNS = (frozenset({"chosen", "rejected"}), frozenset({"chosen_response", "rejected_response"}))
_QUESTIONS = ("instruction", "question", "input")
_CONVERSATIONS = ("messages", "conversations")
_ANSWERS = ("completion", "output")
_TRUTH: dict[str, bool] = {"true": True, "false": False, "1": True, "0": False}
_NAME = "name the columns with `columns`"

Messages = list[dict[str, Any]]
Words = str | Messages  # a prompt or a completion, as text or as messages


def preference(row: Mapping[str, Any], place: str) -> Preference:
    """Convert a row of a pair. Raises DataError, also if both completions are equal."""
    names = [_present(row, (name, f"{name}_response"), place) for name in ("chosen", "rejected")]
    chosen, rejected = (_words(row, name, place) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{place}: 'chosen' holds {kind(row[names[0]])}, 'rejected' {kind(row[names[1]])}; expected text "
            "in both, or messages in both",
            hint=CORRECT,
        )
    for name, words in zip(names, (chosen, rejected), strict=True):
        _check_not_empty(words, name, place)
    if chosen == rejected:
        raise DataError(f"{place}: 'chosen' and 'rejected' are equal", hint=REMOVE)
    prompt = _prompt(row, chosen, place)
    if prompt is None:
        shared = num_shared(chosen, rejected)
        if not shared:
            raise DataError(
                f"{place} has no prompt, and 'chosen' and 'rejected' share no beginning; its columns are "
                f"{listed(row)}",
                hint=f"add a column prompt, or {_NAME}",
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = prompt if isinstance(prompt, str) else with_system(row, prompt, place)
    return Preference(
        _answered(row, prompt, chosen, names[0], place), _answered(row, prompt, rejected, names[1], place)
    )


def num_shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many characters or messages are the prompt of both.

    This is the rule of `trl.data_utils.extract_prompt`: as many as are equal, but for a space at the end,
    which belongs to the completions; where one continues the other, all but the last of the shorter.
    """
    most = min(len(chosen), len(rejected))
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), None)
    if shared is None:
        return most - 1
    return shared - 1 if shared and chosen[shared - 1] == " " else shared


def labelled(row: Mapping[str, Any], place: str) -> Labelled:
    """Convert a row of a completion and its label. Raises DataError."""
    label = _label(row, place)
    name = next((name for name in _ANSWERS if name in row), None)
    if name is None:
        name = next((name for name in _CONVERSATIONS if row.get(name) is not None), None)
        if name is None:
            raise DataError(
                f"{place} has no column 'completion', which the format labelled needs; it has {listed(row)}",
                hint=_NAME,
            )
        return Labelled(_split(row, name, place), label)
    completion = _words(row, name, place)
    _check_not_empty(completion, name, place)
    prompt = _prompt(row, completion, place)
    if prompt is not None:
        return Labelled(_answered(row, prompt, completion, name, place), label)
    if isinstance(completion, str) or len(completion) < 2:
        raise DataError(
            f"{place} has no prompt; its columns are {listed(row)}", hint=f"add a column prompt, or {_NAME}"
        )
    return Labelled(_split(row, name, place), label)


def _split(row: Mapping[str, Any], name: str, place: str) -> Answered:
    """Take the last message of a conversation as the completion of the others."""
    messages = read_messages(row[name], name, place)
    if len(messages) < 2:
        raise DataError(
            f"{place}: {name!r} holds 1 message, expected a question and its answer", hint=CORRECT
        )
    _check_not_empty(messages[-1:], f"{name}[{len(messages) - 1}]", place)
    return _answered(row, with_system(row, messages[:-1], place), messages[-1:], name, place)


def _label(row: Mapping[str, Any], place: str) -> bool:
    name = _present(row, LABELS, place)
    value = row[name]
    found = value if isinstance(value, bool) else None
    if isinstance(value, (int, str)) and found is None:
        found = _TRUTH.get(str(value).strip().lower())
    if found is None:
        what = repr(value)[:40] if isinstance(value, (int, float, str)) else kind(value)
        raise DataError(f"{place}: {name!r} holds {what}, expected true or false", hint=CORRECT)
    return found


def _present(row: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    """Return the first of `names` that the row has. Raises DataError if there is none, or null in it."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is not None:
        return name
    if any(name in row for name in names):
        raise DataError(f"{place}: {next(n for n in names if n in row)!r} is null", hint=NULL)
    raise DataError(f"{place} has no column {names[0]!r}; it has {listed(row)}", hint=_NAME)


def _words(row: Mapping[str, Any], name: str, place: str) -> Words:
    """Read text, messages, or one message as a list of one."""
    value = row[name]
    if isinstance(value, str):
        return checked_text(value, name, place)
    if value is None:
        raise DataError(f"{place}: {name!r} is null", hint=NULL)
    if not isinstance(value, (list, dict)):
        raise DataError(f"{place}: {name!r} holds {kind(value)}, expected text or messages", hint=CORRECT)
    return read_messages([value] if isinstance(value, dict) else value, name, place)


def _check_not_empty(words: Words, name: str, place: str) -> None:
    is_said = bool(words) if isinstance(words, str) else any(_says(message) for message in words)
    if not is_said:
        raise DataError(f"{place}: {name!r} is empty", hint=REMOVE)


def _says(message: dict[str, Any]) -> bool:
    return bool(message["content"] or message.get("tool_calls"))


def _prompt(row: Mapping[str, Any], completion: Words, place: str) -> Words | None:
    """Return the prompt that the columns have for a completion; None: it is the beginning of the completion.

    Messages that do not begin with the assistant hold their prompt, whatever text stands in `prompt`, as in
    `trl.data_utils.maybe_extract_prompt`.
    """
    if not isinstance(completion, str):
        if isinstance(row.get("prompt"), (list, dict)):
            return with_system(row, _message_list(_words(row, "prompt", place)), place)
        if completion[0]["role"] != "assistant":
            return None
    if "prompt" in row:
        prompt = _words(row, "prompt", place)
        if isinstance(completion, str) or not isinstance(prompt, str):
            return prompt
        return asked({**row, "input": None}, "prompt", place)
    for name in _QUESTIONS:
        if row.get(name) is not None:
            return asked(row, name, place)
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            return with_system(row, read_messages(row[name], name, place), place)
    return None


def _message_list(words: Words) -> Messages:
    assert not isinstance(words, str)
    return words


def _answered(row: Mapping[str, Any], prompt: Words, completion: Words, name: str, place: str) -> Answered:
    """Join a prompt and its completion. Raises DataError if one is text and the other messages, or if their
    roles are out of order."""
    if isinstance(prompt, str) and isinstance(completion, str):
        if row.get("system"):
            raise DataError(
                f"{place} has a system prompt, but its prompt is text and not a conversation",
                hint="set columns: {prompt: instruction} for a conversation, or {system: null} to omit it",
            )
        return Pair(prompt, completion)
    if isinstance(completion, str) and row.get("prompt") is None:
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) or isinstance(completion, str):
        text, messages = ("prompt", name) if isinstance(prompt, str) else (name, "prompt")
        raise DataError(
            f"{place}: {text!r} holds text, {messages!r} messages; expected text in both, or messages "
            "in both",
            hint=CORRECT,
        )
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the prompt ends with a message of the assistant, which belongs to the completion",
            hint=CORRECT,
        )
    for message, verb in ((completion[0], "begins"), (completion[-1], "ends")):
        if message["role"] != "assistant":
            raise DataError(
                f"{place}: {name!r} {verb} with a message of the role {message['role']}, expected the "
                "assistant's",
                hint=CORRECT,
            )
    return Chat(prompt + completion, read_tools(row, place), len(prompt))
