"""Formats: each is known by its columns, becomes what it should, and can be named instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_helpers import dataset, examples, write_parquet, write_rows
from horizon_lm.data import Documents
from horizon_lm.data.examples import Chat, Pair, Text
from horizon_lm.data.formats import convert, detect
from horizon_lm.errors import DataError


def chat(*turns: str, system: str | None = None, **more: Any) -> Chat:
    """user, assistant, user, ... in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Chat(messages, **more)


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = Chat(
    [
        message("user", "q"),
        message("assistant", "", tool_calls=[CALL]),
        message("tool", "r"),
        message("assistant", "s"),
    ],
    [TOOL],
)

ROWS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "text": ({"text": "a", "id": 1}, "text", Text("a")),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "prompt_completion", Pair("a", "b")),
    "of messages": (
        {"prompt": [message("user", "a")], "completion": [message("assistant", "b")]},
        "prompt_completion",
        chat("a", "b", num_prompt=1),
    ),
    "messages": (
        {"messages": [message("user", "a"), message("assistant", "b")]},
        "messages",
        chat("a", "b"),
    ),
    "messages with parts": (
        {"messages": [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]},
        "messages",
        chat("ab"),
    ),
    "messages with a system column": (
        {"messages": [message("user", "a"), message("assistant", "b")], "system": "s"},
        "messages",
        chat("a", "b", system="s"),
    ),
    "tools as objects": (
        {
            "messages": [
                message("user", "q"),
                message(
                    "assistant",
                    None,
                    tool_calls=[{**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}],
                ),
                message("tool", "r"),
                message("assistant", "s"),
            ],
            "tools": [TOOL],
        },
        "messages",
        CALLED,
    ),
    "tools as text": (
        {
            "messages": CALLED.messages,
            "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
        },
        "messages",
        CALLED,
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "alpaca", chat("a", "b")),
    "alpaca, all columns": (
        {
            "instruction": "c",
            "input": "x",
            "output": "d",
            "system": "s",
            "history": [["a", "b"]],
        },
        "alpaca",
        chat("a", "b", "c\nx", "d", system="s"),
    ),
    "alpaca, nothing else": ({"instruction": "a", "output": "b"}, "alpaca", chat("a", "b")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 3},
        "sharegpt",
        chat("a", "b"),
    ),
    "sharegpt with system": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        "sharegpt",
        chat("a", "b", system="s"),
    ),
    "sharegpt in roles": (
        {"conversations": [message("user", "a"), message("assistant", "b")]},
        "sharegpt",
        chat("a", "b"),
    ),
    "sharegpt with calls": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "s"},
            ],
            "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
        },
        "sharegpt",
        CALLED,
    ),
    "sharegpt with two calls at once": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g"}]'},
            ]
        },
        "sharegpt",
        Chat(
            [
                message("user", "q"),
                message(
                    "assistant",
                    "",
                    tool_calls=[
                        {"type": "function", "function": {"name": name, "arguments": {}}} for name in "fg"
                    ],
                ),
            ]
        ),
    ),
    "sharegpt that the assistant begins": (
        {"conversations": [{"from": "gpt", "value": "h"}, {"from": "human", "value": "a"}]},
        "sharegpt",
        Chat([message("assistant", "h"), message("user", "a")]),
    ),
    "messages before text": ({"text": "a", "messages": [message("user", "b")]}, "messages", chat("b")),
    "null columns do not count": ({"messages": None, "text": "a"}, "text", Text("a")),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_known_by_its_columns_and_converted(case: str) -> None:
    row, format, expected = ROWS[case]
    assert detect(row, "here") == format
    assert convert(row, format, "here") == expected


@pytest.mark.parametrize("case", [case for case in ROWS if "null" not in case])
def test_the_same_from_a_file(case: str, tmp_path: Path) -> None:
    row, format, expected = ROWS[case]
    path = write_rows(tmp_path / "a.jsonl", [row, row])
    assert examples(path) == [expected] * 2
    documents = Documents([dataset(path)])
    list(documents)
    assert documents.formats == [format]


def test_the_same_from_parquet_which_fills_with_null(tmp_path: Path) -> None:
    """Columns have one type: what some messages lack is null in the others, and is taken away again."""
    rows = [ROWS["messages"][0]["messages"], CALLED.messages]
    path = write_parquet(tmp_path / "a.parquet", {"messages": rows})
    assert examples(path) == [chat("a", "b"), Chat(CALLED.messages)]


def test_arguments_of_other_calls_do_not_appear_in_a_call(tmp_path: Path) -> None:
    """Arrow gives all calls all arguments; what is null was never said."""
    calls = [[{"function": {"name": n, "arguments": {n: 1}}}] for n in ("f", "g")]
    rows = [[message("user", "q"), message("assistant", "", tool_calls=call)] for call in calls]
    path = write_parquet(tmp_path / "a.parquet", {"messages": rows})
    said = [e.messages[1]["tool_calls"][0]["function"]["arguments"] for e in examples(path)]  # type: ignore[union-attr]
    assert said == [{"f": 1}, {"g": 1}]
    lines = write_rows(
        tmp_path / "a.jsonl",
        [
            {
                "messages": [
                    *rows[0][:1],
                    message("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": None}}]),
                ]
            }
        ],
    )
    kept = examples(lines)[0].messages[1]["tool_calls"][0]["function"]["arguments"]  # type: ignore[union-attr]
    assert kept == {"a": None}  # in JSON a null was written by someone


def test_a_format_can_be_named_and_columns_renamed(tmp_path: Path) -> None:
    row = {"question": "a", "answer": "b", "text": "c", "messages": [message("user", "d")]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    renamed = {"question": "prompt", "answer": "completion"}
    assert examples(path) == [chat("d")]
    assert examples(path, format="text") == [Text("c")]
    assert examples(path, format="prompt_completion", columns=renamed) == [Pair("a", "b")]
    assert examples(path, format="alpaca", columns={"question": "instruction", "answer": "output"}) == [
        chat("a", "b")
    ]


@pytest.mark.parametrize(
    ("row", "what", "where", "way"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair", "DPO", "method: dpo"),
        ({"chosen": [message("user", "a")], "rejected": [message("user", "a")]}, "pair", "DPO", "dpo"),
        ({"prompt": "a", "answer": "4"}, "prompt without an answer", "GRPO", "HorizonGRPOTrainer"),
        ({"prompt": "a", "completion": "b", "label": True}, "answer with a label", "KTO", "method: kto"),
        # from csv
        ({"prompt": "a", "completion": "b", "label": "False"}, "answer with a label", "KTO", "method: kto"),
    ],
)
def test_rows_of_other_methods_are_recognised(row: dict[str, Any], what: str, where: str, way: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        detect(row, "a.jsonl:1", "documents")
    assert where in caught.value.message and way in (caught.value.hint or "")


def test_the_advice_for_preference_pairs_works(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    advised = examples(path, format="prompt_completion", columns={"chosen": "completion"})
    assert advised == [Pair("a", "b")]


def test_a_row_that_fits_nothing_names_the_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 fits no known format; its columns are 'q', 'a'"
    ) as caught:
        examples(path)
    assert "columns" in (caught.value.hint or "")
