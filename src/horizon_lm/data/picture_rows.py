"""Pictures in the conversations of rows: each at its place among the words.

| row                                                         | as in                  |
|-------------------------------------------------------------|------------------------|
| parts {type: image} in the content of messages, and `images` | TRL                    |
| messages of text without marks, and `images`                | TRL: all in the first question |
| <image> in the words, and `images` or `image`               | LLaVA, ShareGPT-4V, LLaMA-Factory |

A part may also hold its own picture. Messages with pictures have lists of parts as content, others text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from horizon_lm.data.examples import Chat, Example
from horizon_lm.data.messages import CORRECT
from horizon_lm.data.pictures import LEAVE_OUT, picture_of, pictures_of
from horizon_lm.errors import DataError
from horizon_lm.words import count

MARK = "<image>"
_TRL = frozenset({"messages", "prompt_completion"})  # formats in which marks may be left out
_OF_MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")

Messages = list[dict[str, Any]]


def has_pictures(row: Mapping[str, Any]) -> bool:
    """Tell whether a row of conversations has pictures, by its columns or parts of its messages."""
    if pictures_of(row):
        return True
    for column in _OF_MESSAGES:
        for message in row[column] if isinstance(row.get(column), list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and any(_is_picture(part) for part in content):
                return True
    return False


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def with_pictures(example: Example, row: Mapping[str, Any], folder: Path, place: str, format: str) -> Example:
    """Put the pictures of a row at their places in its conversation. folder: where relative paths start.

    Raises DataError if marks and pictures differ in number, or for a row that is no conversation.
    """
    if format == "text":
        return example  # plain text may stand beside a column of pictures
    given = pictures_of(row)
    if not isinstance(example, Chat):
        if given:
            raise DataError(
                f"{place} has pictures, but its prompt and completion are text",
                hint="write them as messages: [{role: user, content: ...}] and [{role: assistant, ...}], or "
                f"leave the pictures out with {LEAVE_OUT}",
            )
        return example
    messages = example.messages
    if not any(isinstance(message["content"], list) for message in messages):
        messages = _split(messages, given, place, format) if given else messages
        if not given:
            _check_marks(messages, row, place)
            return example
    own = list(_payloads(messages, given, place))
    pictures = tuple(picture_of(value, folder, place) for value in own)
    return replace(example, messages=[_bare(message) for message in messages], pictures=pictures)


def _check_marks(messages: Messages, row: Mapping[str, Any], place: str) -> None:
    """Raise DataError for marks in a row whose column of pictures is empty."""
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks and (row.keys() & {"image", "images"}):
        raise _differ(marks, 0, place)


def _differ(marks: int, pictures: int, place: str) -> DataError:
    return DataError(
        f"{place} has {count(marks, 'mark of a picture', 'marks of pictures')} ({MARK}, or parts of type "
        f"image) and {count(pictures, 'picture')}",
        hint=CORRECT,
    )


def _split(messages: Messages, given: Sequence[Any], place: str, format: str) -> Messages:
    """Cut words at their marks; without any, put all pictures before the first question, as TRL does."""
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks:
        if marks != len(given):
            raise _differ(marks, len(given), place)
        return [{**message, "content": _parts(message["content"])} for message in messages]
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if format not in _TRL or first is None:
        raise _differ(0, len(given), place)
    return [
        {**message, "content": [*([{"type": "image"}] * len(given) if i == first else []), _text(message)]}
        for i, message in enumerate(messages)
    ]


def _text(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": message["content"]}


def _parts(words: str) -> list[dict[str, Any]]:
    """Cut at the marks. Line breaks beside a mark go: chat templates write their own."""
    parts: list[dict[str, Any]] = []
    pieces = words.split(MARK)
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if i < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


def _payloads(messages: Messages, given: Sequence[Any], place: str) -> Iterator[Any]:
    """Yield the picture of each part of type image: its own, or the next of `given`."""
    parts = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    if sum("image" not in part for part in parts) != len(given):
        raise _differ(sum("image" not in part for part in parts), len(given), place)
    rest = iter(given)
    for part in parts:
        yield part["image"] if "image" in part else next(rest)


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message in parts, without pictures."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [_text(message)]}
    return {**message, "content": [{"type": "image"} if p["type"] == "image" else p for p in content]}


def picture_message(words: str, number: int) -> dict[str, Any]:
    """Return a question about pictures, which are at their marks or before the words."""
    if not number:
        return {"role": "user", "content": words}
    if words.count(MARK) == number:
        return {"role": "user", "content": _parts(words)}
    marks = [{"type": "image"}] * number
    return {"role": "user", "content": [*marks, {"type": "text", "text": words}]}
