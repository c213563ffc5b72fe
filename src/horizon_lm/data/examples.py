"""Shapes of training examples, to which rows of every format are converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from horizon_lm.data.pictures import Picture


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
    """Messages as chat templates take them; the first `num_prompt` are the prompt.

    With pictures their content is a list of parts: {type: text, text}, and {type: image} for each picture.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    num_prompt: int = 0
    pictures: tuple[Picture, ...] = ()


def words_of(message: dict[str, Any]) -> str:
    """Return the text of a message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


Answered = Pair | Chat  # a prompt with its completion


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse completion; both are a Pair, or both a Chat."""

    chosen: Answered
    rejected: Answered


@dataclass(frozen=True)
class Labelled:
    """A prompt with a completion; label: whether it is a desirable one."""

    answer: Answered
    label: bool


Example = Text | Pair | Chat | Preference | Labelled


def sides(example: Example) -> tuple[Answered, ...]:
    """Return the documents of a sample: two of a preference, one of a labelled example, else none."""
    if isinstance(example, Preference):
        return (example.chosen, example.rejected)
    return (example.answer,) if isinstance(example, Labelled) else ()


def texts(example: Example) -> Iterator[str]:
    """Yield all texts of an example, a shared prompt once, for training a tokenizer and for sizes."""
    if isinstance(example, Text):
        yield example.text
    elif isinstance(example, Pair):
        yield example.prompt
        yield example.completion
    elif isinstance(example, Chat):
        yield from map(words_of, example.messages)
    elif isinstance(example, Labelled):
        yield from texts(example.answer)
    else:
        yield from texts(example.chosen)
        yield from _completion(example.rejected)


def _completion(answered: Answered) -> Iterator[str]:
    if isinstance(answered, Pair):
        yield answered.completion
    else:
        yield from map(words_of, answered.messages[answered.num_prompt :])
