"""Formats of rows, and their conversion to the three shapes that are trained on: Text, Pair, Chat.

| format            | columns                                                            | becomes |
|-------------------|--------------------------------------------------------------------|---------|
| text              | text                                                               | Text    |
| prompt_completion | prompt, completion: text both, or messages both                    | Pair, Chat |
| messages          | messages: role, content, (tool_calls); (tools)                     | Chat    |
| alpaca            | instruction, output, (input, system, history)                      | Chat    |
| sharegpt          | conversations: from, value; (system, tools)                        | Chat    |

A dataset's first row decides its format. A row that does not fit is a `DataError` naming its place and
columns; nothing is guessed. Rows for other methods (preference pairs, prompts alone, labelled answers) are
recognised, and the error says what they are for.
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
    """A prompt and the text that follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages as chat templates take them; the first `num_prompt` are the prompt."""

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
_REMOVE = "remove the row, or set on_bad_row: skip"
_NULL = f"write text there, {_REMOVE}"
_CORRECT = "correct the row, or set on_bad_row: skip"
_KNOWN = (
    "set `format`, or rename with `columns`; known are text; messages; prompt and completion; instruction "
    "and output (alpaca); conversations (sharegpt)"
)


def detect(row: Mapping[str, Any], place: str) -> str:
    """Detect the format of a row from its columns. Raises DataError for an unknown one."""
    columns = {key for key, value in row.items() if value is not None}
    _reject_other_methods(columns, row, place)
    for format, needed in _NEEDED.items():
        if needed <= columns:
            return format
    for format, needed in _NEEDED.items():
        if needed <= row.keys():  # it would fit if it were not null
            empty = sorted(needed - columns)[0]
            raise DataError(f"{place}: {empty!r} is null, which the format {format} needs", hint=_NULL)
    raise DataError(f"{place} fits no known format; its columns are {_listed(row)}", hint=_KNOWN)


# Richer formats first, for rows with the columns of two.
_NEEDED: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
}
CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca"})  # those that need a chat template


def _reject_other_methods(columns: set[str], row: Mapping[str, Any], place: str) -> None:
    if {"chosen", "rejected"} <= columns:
        raise DataError(
            f"{place} is a preference pair (chosen, rejected), which is for preference training (DPO)",
            hint="not available yet; to imitate the chosen answers only, set columns: {chosen: messages} or "
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
            hint="not available yet; for supervised tuning set columns: {ANSWER: completion}",
        )


def convert(row: Mapping[str, Any], format: str, place: str) -> Example:
    """Convert a row to its training shape. Raises DataError, with the place, for a row that does not fit."""
    missing = _NEEDED[format] - row.keys()
    if missing:
        name = sorted(missing)[0]
        hint = "set text_column of this dataset to the column of text" if format == "text" else _KNOWN
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
            raise DataError(f"{place}: 'completion' is empty", hint=_REMOVE)
        return pair
    for name in ("prompt", "completion"):
        if not isinstance(row[name], list):
            raise DataError(
                f"{place}: {name!r} holds {kind(row[name])}, expected text in both of prompt and completion, "
                "or messages in both",
                hint=_CORRECT,
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
    """Put the turns of `history` first; append `input` to the instruction on a new line."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": checked_text(row["system"], "system", place)})
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(
                f"{place}: 'history' holds {kind(turn)}, expected pairs of question and answer", hint=_CORRECT
            )
        messages += _turn(turn[0], turn[1], "history", place)
    question = checked_text(row["instruction"], "instruction", place)
    if row.get("input"):
        question += "\n" + checked_text(row["input"], "input", place)
    if not question.strip():
        raise DataError(f"{place}: 'instruction' is empty", hint=_REMOVE)
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
    """Check messages of either spelling (role, content or from, value); return them in the first."""
    if not isinstance(value, list):
        raise DataError(
            f"{place}: {column!r} holds {kind(value)}, expected a list of messages",
            hint="set `format`, or rename with `columns`",
        )
    if not value:
        raise DataError(f"{place}: {column!r} is an empty list", hint=_REMOVE)
    return [_message(entry, f"{place}: {column}[{i}]") for i, entry in enumerate(value)]


def _message(entry: Any, at: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{at} holds {kind(entry)}, expected an object with role and content", hint=_CORRECT)
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if role is None:
        raise _without(entry, ("role", "from"), at)
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(
            f"{at}: the role is {role!r}"[:200],
            hint="use system, developer, user, assistant or tool, or rename roles with `tags`",
        )
    role = _ROLES[role]
    content = _content(message.pop("content", message.pop("value", None)), at)
    if role == "function_call":  # a tool call of the assistant in sharegpt
        if content is None:
            raise _without(entry, ("content", "value"), at)
        said = _parsed(content, at)
        calls = said if isinstance(said, list) else [said]
        return {"role": "assistant", "content": "", "tool_calls": [_call(call, at) for call in calls]}
    message.pop("value", None)
    calls = message.pop("tool_calls", None)
    if calls and role == "assistant":
        if not isinstance(calls, list):
            raise DataError(f"{at}: 'tool_calls' holds {kind(calls)}, expected a list", hint=_CORRECT)
        message["tool_calls"] = [_call(call, at) for call in calls]
    elif content is None:
        raise _without(entry, ("content", "value"), at)
    return {"role": role, "content": content or "", **message}


def _without(entry: Mapping[str, Any], names: tuple[str, str], at: str) -> DataError:
    """Return the error for a message without a key, which has two names, or with null there."""
    for name in names:
        if name in entry:
            return DataError(f"{at}: {name!r} is null", hint=_NULL)
    return DataError(
        f"{at} has no {names[0]!r}; it has {_listed(entry)}",
        hint=f"add {names[0]!r}, or {names[1]!r} as in sharegpt; in parquet, null counts as absent",
    )


def _content(value: Any, at: str) -> str | None:
    """Return text; joins OpenAI's list of parts if all are text."""
    if value is None:
        return None
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                what = part.get("type") if isinstance(part, dict) else kind(part)
                raise DataError(f"{at}: 'content' has a part that is not text: {what!r}"[:200], hint=_REMOVE)
        value = "".join(checked_text(part.get("text"), "content", at) for part in value)
    return checked_text(value, "content", at)


def _call(call: Any, at: str) -> dict[str, Any]:
    """Normalise a tool call for templates: arguments as an object, not as JSON text."""
    if not isinstance(call, dict):
        raise DataError(f"{at}: a tool call holds {kind(call)}, expected an object", hint=_CORRECT)
    call = {key: value for key, value in call.items() if value is not None}
    function = dict(call.get("function", call))
    if not isinstance(function.get("name"), str):
        raise DataError(f"{at}: a tool call has no 'name'; it has {_listed(function)}", hint=_CORRECT)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", at)
    if not isinstance(arguments, dict):
        raise DataError(
            f"{at}: the arguments of a tool call are {kind(arguments)}, expected an object", hint=_CORRECT
        )
    function = {"name": function["name"], "arguments": arguments}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def _tools(row: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a conversation, also from JSON text, as in columns of one type."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{place}: tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' holds {kind(tools)}, expected a list of objects", hint=_CORRECT)
    return tools


def _parsed(text: str | None, at: str) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: {str(text)[:60]!r} is not valid JSON: {error}", hint=_CORRECT) from error


def checked_text(value: Any, column: str, place: str) -> str:
    """Return `value` if it is text that can be encoded. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} holds {kind(value)}, not text", hint=_CORRECT)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: character {error.start} is half of a surrogate pair", hint=_CORRECT
            ) from error
    return value


def texts(example: Example) -> Iterator[str]:
    """Yield all texts of an example, for training a tokenizer and for sizes."""
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
