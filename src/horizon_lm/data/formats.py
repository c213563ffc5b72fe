"""Formats of rows, and their conversion to the shapes that are trained on (`data.examples`).

| format            | columns                                                            | becomes |
|-------------------|--------------------------------------------------------------------|---------|
| text              | text                                                               | Text    |
| prompt_completion | prompt, completion: text both, or messages both                    | Pair, Chat |
| messages          | messages: role, content, (tool_calls); (tools)                     | Chat    |
| alpaca            | instruction, output, (input, system, history)                      | Chat    |
| sharegpt          | conversations: from, value; (system, tools)                        | Chat    |
| preference        | chosen, rejected, and a prompt: see `data.preferences`             | Preference |
| labelled          | completion, label, and a prompt: see `data.preferences`            | Labelled |

A dataset's first row decides its format, and the kind of the data: documents, pairs or labelled. A row that
does not fit is a `DataError` naming its place and columns; nothing is guessed. Rows for other methods are
recognised, and the error says what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from horizon_lm.config.preference import DataKind
from horizon_lm.data.examples import Chat, Example, Pair, Text
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
from horizon_lm.data.preferences import LABELS, PAIR_COLUMNS, labelled, preference
from horizon_lm.data.readers import kind
from horizon_lm.errors import DataError

_KNOWN = (
    "set `format`, or rename with `columns`; known are text; messages; prompt and completion; instruction "
    "and output (alpaca); conversations (sharegpt); chosen and rejected; completion and label"
)
# Richer formats first, for rows with the columns of two.
_NEEDED: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
}
CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca"})  # those that need a chat template
_KINDS: dict[str, DataKind] = {"preference": "pairs", "labelled": "labelled"}
KIND_WORDS = {"documents": "documents", "pairs": "preference pairs", "labelled": "labelled completions"}


def kind_of(format: str) -> DataKind:
    """Return what a sample of a format is."""
    return _KINDS.get(format, "documents")


def detect(row: Mapping[str, Any], place: str, wanted: DataKind | None = None) -> str:
    """Detect the format of a row from its columns. wanted: the kind of data that the method takes; None: any.

    Raises DataError for an unknown format, and for one of another kind.
    """
    columns = {key for key, value in row.items() if value is not None}
    if wanted in (None, "documents"):
        return _detect_documents(columns, row, place, wanted)
    found = "labelled" if row.keys() & set(LABELS) else None
    if any(names <= row.keys() for names in PAIR_COLUMNS):
        found = "preference"
    if found is None or kind_of(found) != wanted:
        raise _other_kind(found, row, place)
    return found


def _detect_documents(columns: set[str], row: Mapping[str, Any], place: str, wanted: DataKind | None) -> str:
    """Prefer formats of documents, except that chosen and rejected always are a pair, and a prompt and a
    completion with a truth value as `label` a labelled sample."""
    fitting = next((format for format, needed in _NEEDED.items() if needed <= columns), None)
    other = None
    if PAIR_COLUMNS[0] <= columns or fitting is None and any(names <= row.keys() for names in PAIR_COLUMNS):
        other = "preference"
    elif {"prompt", "completion", "label"} <= columns and str(row["label"]).lower() in ("true", "false"):
        other = "labelled"
    if other is not None:
        if wanted is not None:
            raise _for_method(other, place)
        return other
    _reject_prompt_alone(columns, row, place)
    if fitting is not None:
        return fitting
    for format, needed in _NEEDED.items():
        if needed <= row.keys():  # it would fit if it were not null
            empty = sorted(needed - columns)[0]
            raise DataError(f"{place}: {empty!r} is null, which the format {format} needs", hint=NULL)
    raise DataError(f"{place} fits no known format; its columns are {listed(row)}", hint=_KNOWN)


def _for_method(format: str, place: str) -> DataError:
    """Return the error for a row of preferences among documents."""
    if format == "preference":
        return DataError(
            f"{place} is a preference pair (chosen, rejected), which is for preference training (DPO), not "
            "method: sft",
            hint="set method: dpo; to imitate the chosen answers only, set columns: {chosen: messages} or "
            "{chosen: completion}, with format: messages or prompt_completion",
        )
    return DataError(
        f"{place} is an answer with a label, which is for unpaired preference training (KTO), not "
        "method: sft",
        hint="set method: kto; to imitate all answers set format: prompt_completion",
    )


def _other_kind(found: str | None, row: Mapping[str, Any], place: str) -> DataError:
    """Return the error for a row that is not of the kind which a method of preferences takes."""
    if found == "preference":
        return DataError(
            f"{place} is a preference pair (chosen, rejected), but method: kto takes completions with "
            "a label",
            hint="set method: dpo, or write each answer as a row of its own with a label",
        )
    if found == "labelled":
        return DataError(
            f"{place} is a completion with a label, but the method takes pairs (chosen, rejected)",
            hint="set method: kto, or name the columns of a pair with `columns`",
        )
    return DataError(
        f"{place} holds no preference, which the method needs; its columns are {listed(row)}",
        hint="set method: sft, or name the columns (chosen and rejected; completion and label) with "
        "`columns`",
    )


def _reject_prompt_alone(columns: set[str], row: Mapping[str, Any], place: str) -> None:
    if "prompt" in columns and not row.keys() & {"completion", "messages", "conversations", "text"}:
        raise DataError(
            f"{place} is a prompt without an answer, which is for reinforcement learning (GRPO); its columns "
            f"are {listed(row)}",
            hint="train with horizon_lm.trainers.HorizonGRPOTrainer; for supervised tuning set columns: "
            "{ANSWER: completion}",
        )


def convert(row: Mapping[str, Any], format: str, place: str) -> Example:
    """Convert a row to its training shape. Raises DataError, with the place, for a row that does not fit."""
    missing = _NEEDED.get(format, frozenset()) - row.keys()
    if missing:
        name = sorted(missing)[0]
        hint = "set text_column of this dataset to the column of text" if format == "text" else _KNOWN
        raise DataError(
            f"{place} has no column {name!r}, which the format {format} needs; it has {listed(row)}", hint
        )
    return _CONVERTERS[format](row, place)


def _text(row: Mapping[str, Any], place: str) -> Example:
    return Text(checked_text(row["text"], "text", place))


def _prompt_completion(row: Mapping[str, Any], place: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        pair = Pair(checked_text(prompt, "prompt", place), checked_text(completion, "completion", place))
        if not pair.completion:
            raise DataError(f"{place}: 'completion' is empty", hint=REMOVE)
        return pair
    for name in ("prompt", "completion"):
        if not isinstance(row[name], list):
            raise DataError(
                f"{place}: {name!r} holds {kind(row[name])}, expected text in both of prompt and completion, "
                "or messages in both",
                hint=CORRECT,
            )
    before = read_messages(prompt, "prompt", place)
    after = read_messages(completion, "completion", place)
    return Chat(before + after, read_tools(row, place), len(before))


def _chat(row: Mapping[str, Any], place: str) -> Example:
    messages = with_system(row, read_messages(row["messages"], "messages", place), place)
    return Chat(messages, read_tools(row, place))


def _sharegpt(row: Mapping[str, Any], place: str) -> Example:
    messages = with_system(row, read_messages(row["conversations"], "conversations", place), place)
    return Chat(messages, read_tools(row, place))


def _alpaca(row: Mapping[str, Any], place: str) -> Example:
    question = asked(row, "instruction", place)
    answer = checked_text(row["output"], "output", place)
    return Chat([*question, {"role": "assistant", "content": answer}])


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": preference,
    "labelled": labelled,
}
