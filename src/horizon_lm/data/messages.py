"""Messages of a conversation, their tools and texts: checked, and normalised for chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from horizon_lm.data.readers import Media, kind
from horizon_lm.errors import DataError

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
_PICTURES = ("image", "path", "url", "image_url", "base64")  # keys of a part that hold its picture
REMOVE = "remove the row, or set on_bad_row: skip"
NULL = f"write text there, {REMOVE}"
CORRECT = "correct the row, or set on_bad_row: skip"


def read_messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    """Check messages of either spelling (role, content or from, value); return them in the first."""
    if not isinstance(value, list):
        raise DataError(
            f"{place}: {column!r} holds {kind(value)}, expected a list of messages",
            hint="set `format`, or rename with `columns`",
        )
    if not value:
        raise DataError(f"{place}: {column!r} is an empty list", hint=REMOVE)
    return [_message(entry, f"{place}: {column}[{i}]") for i, entry in enumerate(value)]


def _message(entry: Any, at: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{at} holds {kind(entry)}, expected an object with role and content", hint=CORRECT)
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
        said = _parsed(content if isinstance(content, str) else None, at)
        calls = said if isinstance(said, list) else [said]
        return {"role": "assistant", "content": "", "tool_calls": [_call(call, at) for call in calls]}
    message.pop("value", None)
    calls = message.pop("tool_calls", None)
    if calls and role == "assistant":
        if not isinstance(calls, list):
            raise DataError(f"{at}: 'tool_calls' holds {kind(calls)}, expected a list", hint=CORRECT)
        message["tool_calls"] = [_call(call, at) for call in calls]
    elif content is None:
        raise _without(entry, ("content", "value"), at)
    return {"role": role, "content": content or "", **message}


def _without(entry: Mapping[str, Any], names: tuple[str, str], at: str) -> DataError:
    """Return the error for a message without a key, which has two names, or with null there."""
    for name in names:
        if name in entry:
            return DataError(f"{at}: {name!r} is null", hint=NULL)
    return DataError(
        f"{at} has no {names[0]!r}; it has {listed(entry)}",
        hint=f"add {names[0]!r}, or {names[1]!r} as in sharegpt; in parquet, null counts as absent",
    )


def _content(value: Any, at: str) -> str | list[dict[str, Any]] | None:
    """Return text; joins OpenAI's list of parts if all are text, and else returns the parts."""
    if value is None:
        return None
    if not isinstance(value, list):
        return checked_text(value, "content", at)
    parts = [_part(part, at) for part in value]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, at: str) -> dict[str, Any]:
    """Return a part as {type: text, text} or {type: image}, the latter with `image` if it names its own."""
    what = part.get("type") if isinstance(part, dict) else kind(part)
    if what == "text":
        return {"type": "text", "text": checked_text(part.get("text"), "content", at)}
    if what not in ("image", "image_url"):
        raise DataError(f"{at}: 'content' has a part that is not text: {what!r}"[:200], hint=REMOVE)
    own = next((part[key] for key in _PICTURES if part.get(key) is not None), None)
    return {"type": "image"} if own is None else {"type": "image", "image": own}


def _call(call: Any, at: str) -> dict[str, Any]:
    """Normalise a tool call for templates: arguments as an object, not as JSON text."""
    if not isinstance(call, dict):
        raise DataError(f"{at}: a tool call holds {kind(call)}, expected an object", hint=CORRECT)
    call = {key: value for key, value in call.items() if value is not None}
    function = dict(call.get("function", call))
    if not isinstance(function.get("name"), str):
        raise DataError(f"{at}: a tool call has no 'name'; it has {listed(function)}", hint=CORRECT)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", at)
    if not isinstance(arguments, dict):
        raise DataError(
            f"{at}: the arguments of a tool call are {kind(arguments)}, expected an object", hint=CORRECT
        )
    function = {"name": function["name"], "arguments": arguments}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def read_tools(row: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a conversation, also from JSON text, as in columns of one type."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{place}: tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' holds {kind(tools)}, expected a list of objects", hint=CORRECT)
    return tools


def _parsed(text: str | None, at: str) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: {str(text)[:60]!r} is not valid JSON: {error}", hint=CORRECT) from error


def checked_text(value: Any, column: str, place: str) -> str:
    """Return `value` if it is text that can be encoded. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} holds {kind(value)}, not text", hint=CORRECT)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: character {error.start} is half of a surrogate pair", hint=CORRECT
            ) from error
    return value


def with_system(row: Mapping[str, Any], messages: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Put the column `system` first, unless the messages have a system prompt of their own."""
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": checked_text(system, "system", place)}, *messages]
    return messages


def asked(row: Mapping[str, Any], column: str, place: str) -> list[dict[str, Any]]:
    """Return a conversation up to the question in `column`, as in Alpaca: the turns of `system` and `history`
    first; `input` is appended to the question on a new line."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": checked_text(row["system"], "system", place)})
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(
                f"{place}: 'history' holds {kind(turn)}, expected pairs of question and answer", hint=CORRECT
            )
        user, assistant = (checked_text(said, "history", place) for said in turn)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    question = checked_text(row[column], column, place)
    if column != "input" and row.get("input"):
        question += "\n" + checked_text(row["input"], "input", place)
    if not question.strip():
        raise DataError(f"{place}: {column!r} is empty", hint=REMOVE)
    return [*messages, {"role": "user", "content": question}]


def listed(row: Mapping[str, Any]) -> str:
    names = [
        repr(str(name)[:40]) + (f" ({value.kind})" if isinstance(value, Media) else "")
        for name, value in row.items()
    ]
    return (", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"
