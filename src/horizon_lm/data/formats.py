"""From rows as people keep them to the three shapes that are trained on: text, pair, chat.

| format            | columns                                                            | becomes |
|-------------------|--------------------------------------------------------------------|---------|
| text              | text                                                               | Text    |
| prompt_completion | prompt, completion: text both, or messages both                    | Pair, Chat |
| messages          | messages: role, content, (tool_calls); (tools)                     | Chat    |
| alpaca            | instruction, output, (input, system, history)                      | Chat    |
| sharegpt          | conversations: from, value; (system, tools)                        | Chat    |

The shape of a whole dataset is that of its first row; a row that fits it not is a `DataError` which names the
place and the columns seen, never guessed at. Rows that other methods train on (preference pairs, prompts
alone, answers with a label) are recognised and answered with what they are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from horizon_lm.data.readers import Media, kind
from horizon_lm.errors import DataError


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and the text that is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages in the shape that chat templates take; the first `num_prompt` of them are the prompt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    num_prompt: int = 0


Example = Text | Pair | Chat

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
_NULL = "write text there, or remove the row, or on_bad_row: skip"
_KNOWN = (
    "known are text; messages; prompt and completion; instruction and output (alpaca); conversations "
    "(sharegpt); set `format`, or rename with `columns`"
)


def detect(row: Mapping[str, Any], place: str) -> str:
    """The format of a row, from its columns. Raises DataError for one that is not trained on."""
    columns = {key for key, value in row.items() if value is not None}
    _refuse_other_methods(columns, row, place)
    for format, needed in _NEEDED.items():
        if needed <= columns:
            return format
    for format, needed in _NEEDED.items():
        if needed <= row.keys():  # it would fit, were there anything in it
            empty = sorted(needed - columns)[0]
            raise DataError(f"{place}: {empty!r} is null, which the format {format} needs", hint=_NULL)
    raise DataError(f"{place} fits no known format; its columns are {_listed(row)}", hint=_KNOWN)


# In this order: the richer format first, where a row has the columns of two.
_NEEDED: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
}
CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca"})  # those that need a chat template


def _refuse_other_methods(columns: set[str], row: Mapping[str, Any], place: str) -> None:
    if {"chosen", "rejected"} <= columns:
        raise DataError(
            f"{place} is a preference pair (chosen, rejected), which is for preference training (DPO)",
            hint="not available yet; to imitate the chosen answers only: columns: {chosen: messages} or "
            "{chosen: completion}, with format: messages or prompt_completion",
        )
    if {"prompt", "completion", "label"} <= columns and str(row["label"]).lower() in ("true", "false"):
        raise DataError(
            f"{place} is an answer with a label, which is for unpaired preference training (KTO)",
            hint="not available yet; keep the rows with label true and set format: prompt_completion",
        )
    if "prompt" in columns and not row.keys() & {"completion", "messages", "conversations", "text"}:
        raise DataError(
            f"{place} is a prompt without an answer, which is for reinforcement learning (GRPO); its columns "
            f"are {_listed(row)}",
            hint="not available yet; for supervised tuning name the answer: columns: {ANSWER: completion}",
        )


def convert(row: Mapping[str, Any], format: str, place: str) -> Example:
    """The row in its training shape. Raises DataError with the place for anything that does not fit."""
    missing = _NEEDED[format] - row.keys()
    if missing:
        name = sorted(missing)[0]
        hint = (
            "set text_column of this dataset to the one that holds the text" if format == "text" else _KNOWN
        )
        raise DataError(
            f"{place} has no column {name!r}, which the format {format} needs; it has {_listed(row)}", hint
        )
    return _CONVERTERS[format](row, place)


def _text(row: Mapping[str, Any], place: str) -> Example:
    return Text(checked_text(row["text"], "text", place))


def _prompt_completion(row: Mapping[str, Any], place: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        pair = Pair(checked_text(prompt, "prompt", place), checked_text(completion, "completion", place))
        if not pair.completion:
            raise DataError(f"{place}: 'completion' is empty", hint="remove the row, or on_bad_row: skip")
        return pair
    for name in ("prompt", "completion"):
        if not isinstance(row[name], list):
            raise DataError(
                f"{place}: {name!r} holds {kind(row[name])}, expected text in both of prompt and completion, "
                "or messages in both"
            )
    before = _messages(prompt, "prompt", place)
    after = _messages(completion, "completion", place)
    return Chat(before + after, _tools(row, place), len(before))


def _chat(row: Mapping[str, Any], place: str) -> Example:
    return _with_system(row, _messages(row["messages"], "messages", place), place)


def _sharegpt(row: Mapping[str, Any], place: str) -> Example:
    return _with_system(row, _messages(row["conversations"], "conversations", place), place)


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]], place: str) -> Chat:
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": checked_text(system, "system", place)}, *messages]
    return Chat(messages, _tools(row, place))


def _alpaca(row: Mapping[str, Any], place: str) -> Example:
    """The turns of `history` come first; `input` follows the instruction after a line's end."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": checked_text(row["system"], "system", place)})
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(f"{place}: 'history' holds {kind(turn)}, expected pairs of question and answer")
        messages += _turn(turn[0], turn[1], "history", place)
    question = checked_text(row["instruction"], "instruction", place)
    if row.get("input"):
        question += "\n" + checked_text(row["input"], "input", place)
    if not question.strip():
        raise DataError(f"{place}: 'instruction' is empty", hint="remove the row, or on_bad_row: skip")
    return Chat(messages + _turn(question, row["output"], "output", place))


def _turn(question: Any, answer: Any, name: str, place: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": checked_text(question, name, place)},
        {"role": "assistant", "content": checked_text(answer, name, place)},
    ]


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


# --- messages -------------------------------------------------------------------------------------


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    """Messages of either spelling (role and content, from and value), checked, in the first spelling."""
    if not isinstance(value, list):
        raise DataError(f"{place}: {column!r} holds {kind(value)}, expected a list of messages")
    if not value:
        raise DataError(f"{place}: {column!r} is an empty list", hint="remove the row, or on_bad_row: skip")
    return [_message(entry, f"{place}: {column}[{i}]") for i, entry in enumerate(value)]


def _message(entry: Any, at: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{at} holds {kind(entry)}, expected an object with role and content")
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if role is None:
        raise _without(entry, ("role", "from"), at)
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(
            f"{at}: the role is {role!r}"[:200], hint="roles are system, developer, user, assistant and tool"
        )
    role = _ROLES[role]
    content = _content(message.pop("content", message.pop("value", None)), at)
    if role == "function_call":  # sharegpt's way to write an assistant's call of a tool
        if content is None:
            raise _without(entry, ("content", "value"), at)
        said = _parsed(content, at)
        calls = said if isinstance(said, list) else [said]
        return {"role": "assistant", "content": "", "tool_calls": [_call(call, at) for call in calls]}
    message.pop("value", None)
    calls = message.pop("tool_calls", None)
    if calls and role == "assistant":
        if not isinstance(calls, list):
            raise DataError(f"{at}: 'tool_calls' holds {kind(calls)}, expected a list")
        message["tool_calls"] = [_call(call, at) for call in calls]
    elif content is None:
        raise _without(entry, ("content", "value"), at)
    return {"role": role, "content": content or "", **message}


def _without(entry: Mapping[str, Any], names: tuple[str, str], at: str) -> DataError:
    """The error for a message that lacks a key, which has two names, or holds null under it."""
    for name in names:
        if name in entry:
            return DataError(f"{at}: {name!r} is null", hint=_NULL)
    return DataError(
        f"{at} has no {names[0]!r}; it has {_listed(entry)}",
        hint=f"or {names[1]!r}, as in sharegpt; in parquet, a null counts as absent",
    )


def _content(value: Any, at: str) -> str | None:
    """Text, or OpenAI's list of parts when all are text."""
    if value is None:
        return None
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                what = part.get("type") if isinstance(part, dict) else kind(part)
                raise DataError(f"{at}: 'content' has a part that is no text: {what!r}"[:200])
        value = "".join(checked_text(part.get("text"), "content", at) for part in value)
    return checked_text(value, "content", at)


def _call(call: Any, at: str) -> dict[str, Any]:
    """A tool call as templates want it: the arguments as an object, not as JSON text."""
    if not isinstance(call, dict):
        raise DataError(f"{at}: a tool call holds {kind(call)}, expected an object")
    call = {key: value for key, value in call.items() if value is not None}
    function = dict(call.get("function", call))
    if not isinstance(function.get("name"), str):
        raise DataError(f"{at}: a tool call has no 'name'; it has {_listed(function)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", at)
    if not isinstance(arguments, dict):
        raise DataError(f"{at}: the arguments of a tool call are {kind(arguments)}, expected an object")
    function = {"name": function["name"], "arguments": arguments}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def _tools(row: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The tools of a conversation; as JSON text too, which is how columns of one type hold them."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{place}: tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' holds {kind(tools)}, expected a list of objects")
    return tools


def _parsed(text: str | None, at: str) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: {str(text)[:60]!r} is not valid JSON: {error}") from error


def checked_text(value: Any, column: str, place: str) -> str:
    """`value` if it is text that can be encoded; else a DataError."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} holds {kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: character {error.start} is half of a surrogate pair") from error
    return value


def texts(example: Example) -> Iterator[str]:
    """All the text in an example, for training a tokenizer and for measuring sizes."""
    if isinstance(example, Text):
        yield example.text
    elif isinstance(example, Pair):
        yield example.prompt
        yield example.completion
    else:
        yield from (message["content"] for message in example.messages)


def _listed(row: Mapping[str, Any]) -> str:
    names = [
        repr(str(name)[:40]) + (f" ({value.kind})" if isinstance(value, Media) else "")
        for name, value in row.items()
    ]
    return (", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"
